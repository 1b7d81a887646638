"""Training a head: one loop for both stages.

Stage 1 sees frozen embeddings, in memory or left in the file. In stage 2 the head has ``tops``, the last layers of the
backbone, and sees what enters them. The stages differ in where a batch comes from, in the groups of parameters and in
the schedule of the learning rate; all else is written once.
"""

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import AdamW

from ...cache.errors import MmcliError
from ...cache.features import Features
from ...featurize.backbones.tensors import enough_memory
from ..evaluation.metrics import quick_scores
from ..model.head import Ensemble, Head, sizes_of
from ..model.inputs import Batch, Rows, at_least_float32, batches, shuffled_blocks, state_batch, token_batches
from ..model.losses import Loss, make_loss
from ..recipe import Recipe
from .linear import fit_linear
from .schedules import Plan, plan_of

_STANDARDISED_BYTES = 64 << 20  # of training rows up to this size there is a second copy, standardised

OnEpoch = Callable[[dict[str, float]], None]
OnStep = Callable[[int, int], None]


@dataclass
class Fit:
    """A trained head.

    Attributes
    ----------
    head
        In evaluation mode, with the weights of the best epoch.
    history
        One dict per epoch: epoch, lr (of the first group of parameters, in the last step), train_loss, train_macro_f1
        (where it was asked for), and val_loss, val_macro_f1, val_accuracy where there were validation rows. A linear
        head has one entry, with the C that was chosen.
    best_epoch
        1 for the first.
    """

    head: Head
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0


@dataclass(frozen=True)
class FitOptions:
    """How a fit is run, beside its recipe and rows.

    Attributes
    ----------
    device
        A torch device.
    groups
        Of the training rows, (n,): rows that may not be parted when a linear head chooses its C.
    rates
        Without validation rows: the learning rate of each epoch, as another fit had them. Default: as the recipe says.
    score_train
        Whether the history says how well the training rows are fitted, which takes a pass over them per epoch.
    on_epoch
        Called with each entry of the history.
    on_step
        Called with (steps done, steps at most).
    resume, keep
        What ``keep`` was given last by an interrupted fit of the same; ``keep`` is called after each epoch with all
        that is needed to go on from there. Only a fit with ``tops`` goes on to the bit.
    """

    device: str = "cpu"
    groups: NDArray[np.int64] | None = None
    rates: list[float] | None = None
    score_train: bool = True
    on_epoch: OnEpoch | None = None
    on_step: OnStep | None = None
    resume: Mapping[str, Any] | None = None
    keep: Callable[[dict[str, Any]], None] | None = None


def fit(
    recipe: Recipe,
    n_classes: int,
    train: Rows,
    val: Rows | None = None,
    options: FitOptions | None = None,
    start: Head | None = None,
) -> Fit:
    """Train a head.

    With ``val``: early stopping on its macro-F1, and the weights of the best epoch. Without: all epochs, and the
    weights of the last.

    Parameters
    ----------
    recipe
        How to train.
    n_classes
        C.
    train, val
        Rows to learn from, and rows to stop by.
    options
        Device, callbacks, and what else is not a setting.
    start
        The head to go on from, which is trained in place: a head with ``tops`` is trained by ``recipe.finetune``.
        Default: a new one.

    Raises
    ------
    MmcliError
        Fewer than two training rows, a loss that is not finite, or no room on the device for a batch.
    """
    options = options or FitOptions()
    device = options.device
    if len(train) < 2:
        raise MmcliError(f"{len(train)} training row: at least two are needed")
    batch_size = recipe.batch_size if recipe.finetune is None else recipe.finetune.batch_size
    with own_random(device), one_thread(start is None or start.is_small), enough_memory(device, batch_size):
        if start is not None:
            fitted = _Training(start.to(device), recipe, n_classes, train, options).run(val)
        else:
            torch.manual_seed(recipe.seed)
            head = Head(sizes_of(train.features), n_classes, recipe).to(device)
            head.learn_inputs(train.features)
            if recipe.head == "linear":
                fitted = Fit(head, [_linear_record(head, recipe, n_classes, train, val, options.groups)], 1)
            else:
                fitted = _Training(head, recipe, n_classes, train, options).run(val)
    fitted.head.eval()
    return fitted


@contextlib.contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Compute on one thread: small matrices gain nothing, and threads that wait for a busy core cost ten times as much.

    So a head is also the same to the bit in a process of its own as among others.
    """
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def own_random(device: str) -> contextlib.AbstractContextManager[None]:
    """Leave the global random generators, of the CPU and of ``device``, as they were before."""
    kind = torch.device(device).type
    return torch.random.fork_rng([] if kind == "cpu" else [device], device_type="cuda" if kind == "cpu" else kind)


def _linear_record(
    head: Head, recipe: Recipe, n_classes: int, train: Rows, val: Rows | None, groups: NDArray[np.int64] | None
) -> dict[str, float]:
    chosen = fit_linear(head, recipe, n_classes, train, groups)
    head.eval()
    record: dict[str, float] = {"epoch": 1, "C": chosen}
    loss = make_loss(recipe, np.bincount(train.classes, minlength=n_classes), "cpu")
    for name, rows in (("train", train), ("val", val)):
        if rows is not None:
            logits = torch.from_numpy(predict_logits(head, rows.features))
            record[f"{name}_loss"] = float(loss(logits, torch.from_numpy(rows.classes)))
            record |= scores_of_part(logits, rows.classes, n_classes, name)
    return record


@dataclass(frozen=True)
class _Resident:
    """Training rows on the device.

    Few of them are standardised once; of many there is one copy, as they are stored, to be standardised batch by batch.
    """

    features: Features
    image: Tensor
    text: Tensor
    views: Tensor | None
    classes: Tensor
    is_standardised: bool

    @classmethod
    def of(cls, rows: Rows, head: Head, device: str) -> "_Resident":
        """Put rows that are in memory on the device."""
        features = rows.features
        image, text, views, classes = (
            None if array is None else torch.from_numpy(np.asarray(array)).to(device)
            for array in (features.image, features.text, features.views, rows.classes)
        )
        assert image is not None
        assert text is not None
        assert classes is not None
        size = sum(each.numel() * 4 for each in (image, text, views) if each is not None)
        if size > _STANDARDISED_BYTES or head.tops:
            return cls(features, image, text, views, classes, False)
        image, text, *_ = head.standardised(Batch(image.float(), text.float()))
        if views is not None and head.image_input is not None:
            views = head.image_input(views.flatten(0, 1).float()).unflatten(0, views.shape[:2])
        return cls(features, image, text, views, classes, True)


class _Training:
    """One head on its way: the training rows on the device, the loss, the optimizer, how far it got."""

    def __init__(self, head: Head, recipe: Recipe, n_classes: int, train: Rows, options: FitOptions) -> None:
        self.head, self.recipe, self.n_classes, self.train, self.options = head, recipe, n_classes, train, options
        self.device = options.device
        # The order of rows depends on the seed alone, so that it is the same for every fusion.
        self.order = torch.Generator().manual_seed(recipe.seed)
        # A stream of its own: with the seed of the order, a row's view would depend on its place in the epoch.
        view_seed = int(np.random.SeedSequence([recipe.seed, 1]).generate_state(1)[0])
        self.which_view = torch.Generator().manual_seed(view_seed)
        self.epoch_random = np.random.default_rng(recipe.seed)
        self.views = recipe.views and "image" not in train.features.states
        if self.views and train.features.views is None:
            raise MmcliError("this recipe trains on augmented views, but these features have none")
        self.resident = None if train.features.places is not None else _Resident.of(train, head, self.device)
        self.loss: Loss = make_loss(recipe, np.bincount(train.classes, minlength=n_classes), self.device)
        self.plan: Plan = plan_of(recipe, head, len(train), options.rates)
        self.optimizer = AdamW(self.plan.groups, weight_decay=recipe.weight_decay, fused=True)
        self.scheduler = self.plan.scheduler(self.optimizer)
        self.fit = Fit(head)
        self.best: tuple[float, float] = (-1.0, 0.0)  # macro-F1, and of equal ones the lower loss
        self.last_rise, self.steps_done = 0, 0
        self.best_weights = head.weights()
        if options.resume is not None:
            self._load(options.resume)

    def run(self, val: Rows | None) -> Fit:
        """Train to the end; with ``val``, go back to the best epoch."""
        history = self.fit.history
        while len(history) < self.plan.epochs and not (history and len(history) - self.last_rise >= self.plan.patience):
            epoch = len(history) + 1
            loss, rate = self._epoch(epoch)
            record: dict[str, float] = {"epoch": epoch, "lr": rate, "train_loss": loss}
            self.head.eval()
            if self.options.score_train:
                scores = scores_of_part(self._training_logits(), self.train.classes, self.n_classes, "train")
                record["train_macro_f1"] = scores["train_macro_f1"]
            if val is None:
                self.last_rise = self.fit.best_epoch = epoch
            else:
                record |= self._score(val)
                self._compare_with_best(epoch, record)
            self.plan.after_epoch(self.scheduler, record.get("val_macro_f1"))
            history.append(record)
            if self.options.on_epoch is not None:
                self.options.on_epoch(record)
            if self.options.keep is not None:
                self.options.keep(self._state())
        if val is not None:
            self.head.load_weights(self.best_weights)
        return self.fit

    def _score(self, val: Rows) -> dict[str, float]:
        parts = predict_parts(self.head, val.features)
        true = torch.from_numpy(val.classes).to(self.device)
        record = {"val_loss": float(torch.stack([self.loss(logits, true) for logits in parts]).mean())}
        return record | scores_of_part(parts.mean(dim=0), val.classes, self.n_classes, "val")

    def _compare_with_best(self, epoch: int, record: Mapping[str, float]) -> None:
        if record["val_macro_f1"] > self.best[0]:
            self.last_rise = epoch
        reached = (record["val_macro_f1"], -record["val_loss"])
        if reached > self.best:
            self.best, self.fit.best_epoch, self.best_weights = reached, epoch, self.head.weights()

    def _epoch(self, epoch: int) -> tuple[float, float]:
        """Take one step per batch of shuffled rows; return the mean loss, and the learning rate of the last step."""
        head, groups = self.head.train(), self.optimizer.param_groups
        if head.tops:
            self._reseed(epoch)
        losses, rate = [], groups[0]["lr"]
        for block in self._blocks():
            # In one piece: a small result after each step would keep the memory of the large ones beside it.
            block_losses = torch.zeros(math.ceil(len(block.classes) / self.plan.batch_size), device=self.device)
            losses.append(block_losses)
            steps = 0
            for batch, classes in self._batches(block):
                parts = head.each(batch if block.is_standardised else head.standardised(batch))
                loss = functools.reduce(operator.add, (self.loss(logits, classes) for logits in parts))
                loss.backward()
                rate = groups[0]["lr"]
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.plan.after_step(self.scheduler)
                block_losses[steps] = loss.detach() / len(parts)
                steps += 1
                self.steps_done += 1
                if self.options.on_step is not None:
                    self.options.on_step(self.steps_done, self.plan.steps)
            losses[-1] = block_losses[:steps]
        mean = float(torch.cat(losses).mean())
        if not math.isfinite(mean):
            raise MmcliError(f"training diverged in epoch {epoch} (loss {mean}): lower {self.plan.rate_options}")
        return mean, rate

    def _reseed(self, epoch: int) -> None:
        """Let order and dropout of an epoch depend on seed and epoch alone, so that a resumed fit is the same."""
        self.epoch_random = np.random.default_rng([self.recipe.seed, epoch])
        seed = int(self.epoch_random.integers(2**63))
        torch.manual_seed(seed)
        self.order.manual_seed(seed)
        self.which_view.manual_seed(seed ^ 1)

    def _training_logits(self) -> Tensor:
        """Return the logits of the training rows, (n, C)."""
        rows = self.resident
        if rows is None or not rows.is_standardised or self.head.needs_tokens:
            return predict_parts(self.head, self.train.features).mean(dim=0)
        with torch.inference_mode():
            return self.head.parts(Batch(rows.image, rows.text)).mean(dim=0)

    def _blocks(self) -> "Iterator[_Resident]":
        """Yield the training rows: all at once, or those that are left in the file by the block."""
        if self.resident is not None:
            yield self.resident
            return
        for rows in shuffled_blocks(self.train.features, self.order):
            part = self.train.take(rows)
            yield _Resident.of(Rows(part.features.load(), part.classes), self.head, self.device)

    def _batches(self, block: "_Resident") -> Iterator[tuple[Batch, Tensor]]:
        """Yield the rows of a block and their classes in a new order; with views, one of them stands for each image."""
        size = self.plan.batch_size
        if self.head.tops:
            order = torch.from_numpy(self.epoch_random.permutation(len(block.classes)))
        else:
            order = torch.randperm(len(block.classes), generator=self.order)
        if len(order) % size == 1:
            order = order[:-1]  # BatchNorm has no variance for a batch of one row
        if not len(order):
            return
        view = None
        if self.views and block.views is not None:
            view = torch.randint(block.views.shape[1], (len(block.classes),), generator=self.which_view).to(self.device)
        numbers = order.numpy()
        tokens = token_batches(block.features, self.head.needs_tokens, numbers, size, self.device)
        order = order.to(self.device)
        for start, states in zip(range(0, len(order), size), tokens, strict=True):
            rows = order[start : start + size]
            if view is None or block.views is None:
                image = block.image.index_select(0, rows)
            else:
                image = block.views[rows, view.index_select(0, rows)]
            text, classes = (each.index_select(0, rows) for each in (block.text, block.classes))
            entering = state_batch(block.features, numbers[start : start + size], self.device) if self.head.tops else {}
            yield Batch(at_least_float32(image), at_least_float32(text), states, entering), classes

    def _state(self) -> dict[str, Any]:
        """Return, in main memory, all that is needed to go on from the end of an epoch."""
        return {
            "now": self.head.weights(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {name: value for name, value in self.scheduler.state_dict().items() if name != "lr_lambdas"},
            "steps_done": self.steps_done,
            "history": self.fit.history,
            "best": {"weights": self.best_weights, "reached": list(self.best), "epoch": self.fit.best_epoch},
            "last_rise": self.last_rise,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``_state`` returned."""
        self.head.load_weights(state["now"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state["scheduler"]})
        self.steps_done, self.last_rise = state["steps_done"], state["last_rise"]
        best = state["best"]
        self.fit.history, self.fit.best_epoch = list(state["history"]), best["epoch"]
        self.best, self.best_weights = (best["reached"][0], best["reached"][1]), best["weights"]


def scores_of_part(logits: Tensor, classes: NDArray[np.int64], n_classes: int, part: str) -> dict[str, float]:
    """Return ``<part>_macro_f1`` and ``<part>_accuracy``."""
    scores = quick_scores(classes, logits.argmax(dim=1).cpu().numpy(), n_classes)
    return {f"{part}_{name}": value for name, value in scores.items()}


def predict_parts(head: Head, features: Features) -> Tensor:
    """Return the logits of each MLP of a head, (k, n, C), of n pairs."""
    with torch.inference_mode():
        parts = _by_batch(head, features, lambda batch: head.parts(head.standardised(batch)).transpose(0, 1))
        return parts.transpose(0, 1)


def predict_logits(head: Head | Ensemble, features: Features) -> NDArray[np.float32]:
    """Return the logits, (n, C) float32, of n pairs; a head without ``tops`` ignores the states of towers."""
    with one_thread(head.is_small), torch.inference_mode():
        logits: NDArray[np.float32] = _by_batch(head, features, head).float().cpu().numpy()
    return logits


def _by_batch(head: Head | Ensemble, features: Features, compute: Callable[[Batch], Tensor]) -> Tensor:
    """Return what ``compute`` makes of each row, (n, ...)."""
    device = str(next(head.parameters()).device)
    if not head.tops:
        features = replace(features, states={})
    ordered, back = features.in_fast_order()
    results, start = torch.empty(0), 0
    for batch in batches(ordered, head.needs_tokens, device):
        computed = compute(batch)
        if start == 0:  # in one piece: small results between large intermediate ones would keep the memory of these
            results = computed.new_empty((len(features), *computed.shape[1:]))
        results[start : start + len(computed)] = computed
        start += len(computed)
    return results if back is None else results[torch.from_numpy(back).to(device)]
