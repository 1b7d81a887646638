"""Training a head: one loop for both stages.

In stage 1 the head sees frozen embeddings, in memory or left in the file. In stage 2 the head has ``tops``, the last
layers of the backbone, and sees the states that enter them. The stages differ only in the source of a batch, the groups
of parameters and the schedule of the learning rate.
"""

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import AdamW

from ...cache.errors import MmcliError
from ...cache.features import Features
from ...featurize.backbones.tensors import enough_memory
from ..model.head import Head, sizes_of
from ..model.inputs import Batch, Rows, at_least_float32, shuffled_blocks, state_batch, token_batches
from ..model.losses import Loss, make_loss
from ..recipe import Recipe
from .linear import linear_record
from .prediction import one_thread, predict_parts, scores_of_part
from .schedules import Plan, plan_of

_STANDARDISED_BYTES = 64 << 20  # training rows up to this size are standardised once, in a second copy

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
        One dict per epoch: epoch, lr (the rate of the first group of parameters in the last step), train_loss,
        train_macro_f1 (if asked for), and with validation rows val_loss, val_macro_f1, val_accuracy. A linear head has
        one entry, with the chosen C.
    best_epoch
        Number of the best epoch; the first epoch is 1.
    """

    head: Head
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0


@dataclass(frozen=True)
class FitOptions:
    """How to run a fit, beside its recipe and rows.

    Attributes
    ----------
    device
        A torch device.
    groups
        Group of each training row, (n,): the inner folds of a linear head keep the rows of a group together.
    rates
        Learning rate of each epoch of an earlier fit, to be repeated without validation rows. Default: the schedule of
        the recipe.
    score_train
        Whether the history has the macro-F1 of the training rows, which takes a pass over them per epoch.
    on_epoch
        Called with each entry of the history.
    on_step
        Called with (steps done, steps at most).
    keep
        Called after each epoch with the state of the fit, from which it can go on.
    resume
        The last state that ``keep`` received from the same fit, before it was interrupted. Only a fit with ``tops``
        then gives the same bits as an uninterrupted one.
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

    With ``val``, training stops early by its macro-F1 and keeps the weights of the best epoch. Without ``val``, all
    epochs are trained and the last weights are kept.

    Parameters
    ----------
    recipe
        How to train.
    n_classes
        C.
    train, val
        Rows to learn from, and rows to stop by.
    options
        Device, callbacks and other options that are no settings of the recipe.
    start
        The head to start from, which is trained in place. A head with ``tops`` is trained by ``recipe.finetune``.
        Default: a new head.

    Raises
    ------
    MmcliError
        Fewer than two training rows, a loss that is not finite, or no room on the device for a batch.
    """
    options = options or FitOptions()
    device = options.device
    if len(train) < 2:
        raise MmcliError(f"training needs at least two rows, found {len(train)}: label more pairs")
    batch_size = recipe.batch_size if recipe.finetune is None else recipe.finetune.batch_size
    with own_random(device), one_thread(start is None or start.is_small), enough_memory(device, batch_size):
        if start is not None:
            fitted = _Training(start.to(device), recipe, n_classes, train, options).run(val)
        else:
            torch.manual_seed(recipe.seed)
            head = Head(sizes_of(train.features), n_classes, recipe).to(device)
            head.learn_inputs(train.features)
            if recipe.head == "linear":
                fitted = Fit(head, [linear_record(head, recipe, train, val, options.groups)], 1)
            else:
                fitted = _Training(head, recipe, n_classes, train, options).run(val)
    fitted.head.eval()
    return fitted


def own_random(device: str) -> contextlib.AbstractContextManager[None]:
    """Restore the global random generators of the CPU and of ``device`` afterwards."""
    kind = torch.device(device).type
    return torch.random.fork_rng([] if kind == "cpu" else [device], device_type="cuda" if kind == "cpu" else kind)


@dataclass(frozen=True)
class _Resident:
    """Training rows on the device.

    A small set is standardised once. A large set is kept as it is stored, and standardised batch by batch.
    """

    features: Features
    image: Tensor
    text: Tensor
    views: Tensor | None
    classes: Tensor
    is_standardised: bool

    @classmethod
    def of(cls, rows: Rows, head: Head, device: str) -> "_Resident":
        """Copy rows from memory to the device."""
        features = rows.features
        image, text, classes = (
            torch.from_numpy(np.asarray(array)).to(device) for array in (features.image, features.text, rows.classes)
        )
        views = None if features.views is None else torch.from_numpy(np.asarray(features.views)).to(device)
        size = 4 * (image.numel() + text.numel() + (0 if views is None else views.numel()))
        if size > _STANDARDISED_BYTES or head.tops:
            return cls(features, image, text, views, classes, False)
        image, text, *_ = head.standardised(Batch(image.float(), text.float()))
        if views is not None and head.image_input is not None:
            views = head.image_input(views.flatten(0, 1).float()).unflatten(0, views.shape[:2])
        return cls(features, image, text, views, classes, True)


class _Training:
    """The state of one fit: training rows on the device, loss, optimizer, and the epochs so far."""

    def __init__(self, head: Head, recipe: Recipe, n_classes: int, train: Rows, options: FitOptions) -> None:
        self.head, self.recipe, self.n_classes, self.train, self.options = head, recipe, n_classes, train, options
        self.device = options.device
        # The order of rows depends only on the seed, so that it is the same for every fusion.
        self.order = torch.Generator().manual_seed(recipe.seed)
        # Views have their own seed, or the view of a row would depend on its place in the epoch.
        view_seed = int(np.random.SeedSequence([recipe.seed, 1]).generate_state(1)[0])
        self.which_view = torch.Generator().manual_seed(view_seed)
        self.epoch_random = np.random.default_rng(recipe.seed)
        self.views = recipe.views and "image" not in train.features.states
        if self.views and train.features.views is None:
            raise MmcliError(
                "this recipe trains on augmented views, but these features have none: run `mmcli featurize` with "
                "--views, or leave views out"
            )
        self.resident = None if train.features.places is not None else _Resident.of(train, head, self.device)
        self.loss: Loss = make_loss(recipe, np.bincount(train.classes, minlength=n_classes), self.device)
        self.plan: Plan = plan_of(recipe, head, len(train), options.rates)
        self.optimizer = AdamW(self.plan.groups, weight_decay=recipe.weight_decay, fused=True)
        self.scheduler = self.plan.scheduler(self.optimizer)
        self.fit = Fit(head)
        self.best: tuple[float, float] = (-1.0, 0.0)  # macro-F1, and minus the loss, which decides between equal ones
        self.last_rise, self.steps_done = 0, 0
        self.best_weights = head.weights()
        if options.resume is not None:
            self._load(options.resume)

    def run(self, val: Rows | None) -> Fit:
        """Train all epochs, or with ``val`` until patience ends, and load the weights of the best epoch."""
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
            # One allocation, because small results between large ones would fragment the memory.
            block_losses = torch.zeros(math.ceil(len(block.classes) / self.plan.batch_size), device=self.device)
            losses.append(block_losses)
            steps = 0
            for batch, classes in self._batches(block):
                by_mlp = head.logits_by_mlp(batch if block.is_standardised else head.standardised(batch))
                loss = functools.reduce(operator.add, (self.loss(logits, classes) for logits in by_mlp))
                loss.backward()
                rate = groups[0]["lr"]
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.plan.after_step(self.scheduler)
                block_losses[steps] = loss.detach() / len(by_mlp)
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
        """Make order and dropout depend only on seed and epoch, so that a resumed fit gives the same result."""
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
        """Yield the training rows: all at once from memory, or block by block from the file."""
        if self.resident is not None:
            yield self.resident
            return
        for rows in shuffled_blocks(self.train.features, self.order):
            block = self.train.take(rows)
            yield _Resident.of(Rows(block.features.load(), block.classes), self.head, self.device)

    def _batches(self, block: "_Resident") -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches of a block and their classes in a new order; a random view, if any, replaces each image."""
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
        all_tokens = token_batches(block.features, self.head.needs_tokens, numbers, size, self.device)
        order = order.to(self.device)
        for start, tokens in zip(range(0, len(order), size), all_tokens, strict=True):
            rows = order[start : start + size]
            if view is None or block.views is None:
                image = block.image.index_select(0, rows)
            else:
                image = block.views[rows, view.index_select(0, rows)]
            text, classes = block.text.index_select(0, rows), block.classes.index_select(0, rows)
            states = state_batch(block.features, numbers[start : start + size], self.device) if self.head.tops else {}
            yield Batch(at_least_float32(image), at_least_float32(text), tokens, states), classes

    def _state(self) -> dict[str, Any]:
        """Return all that ``_load`` needs to go on from the end of an epoch."""
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
        """Load what ``_state`` returned."""
        self.head.load_weights(state["now"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state["scheduler"]})
        self.steps_done, self.last_rise = state["steps_done"], state["last_rise"]
        best = state["best"]
        self.fit.history, self.fit.best_epoch = list(state["history"]), best["epoch"]
        self.best, self.best_weights = (best["reached"][0], best["reached"][1]), best["weights"]
