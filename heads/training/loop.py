"""Training a head on features."""

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...cache.errors import MmcliError
from ...cache.features import Features
from ..evaluation.metrics import quick_scores
from ..model.head import Ensemble, Head, sizes_of
from ..model.inputs import Batch, Rows, batches, shuffled_blocks, token_batches
from ..model.losses import Loss, make_loss
from ..recipe import Recipe
from .linear import fit_linear
from .optimizer import AdamW, Plateau

_STANDARDISED_BYTES = 64 << 20  # of training rows up to this size there is a second copy, standardised

OnEpoch = Callable[[dict[str, float]], None]


@dataclass
class Fit:
    """A trained head.

    Attributes
    ----------
    head
        In evaluation mode, with the weights of the best epoch.
    history
        One dict per epoch: epoch, lr, train_loss, train_macro_f1 (where it was asked for), and val_loss, val_macro_f1,
        val_accuracy where there were validation rows. Of a linear head: one entry, with the C that was chosen.
    best_epoch
        1 for the first.
    """

    head: Head
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0


def fit(
    recipe: Recipe,
    n_classes: int,
    train: Rows,
    val: Rows | None = None,
    schedule: list[float] | None = None,
    device: str = "cpu",
    on_epoch: OnEpoch | None = None,
    score_train: bool = True,
    groups: NDArray[np.int64] | None = None,
) -> Fit:
    """Train a head.

    With ``val``: early stopping and ReduceLROnPlateau on its macro-F1, and the weights of the best epoch. Without:
    one epoch for each learning rate in ``schedule``, as another run had them, and the weights of the last.

    Parameters
    ----------
    recipe
        How.
    n_classes
        C.
    train, val
        Rows to learn from, and rows to stop by.
    schedule
        Learning rate of each epoch; only without ``val``. Default: ``recipe.lr`` in each of ``recipe.epochs``.
    device
        A torch device.
    on_epoch
        Called with each entry of the history.
    score_train
        Whether the history says how well the training rows are fitted, which takes a pass over them per epoch.
    groups
        Of the training rows, (n,): rows that may not be parted when a linear head chooses its C.
    """
    if len(train) < 2:
        raise MmcliError(f"{len(train)} training row: at least two are needed")
    with one_thread(), own_random(device):
        torch.manual_seed(recipe.seed)
        head = Head(sizes_of(train.features), n_classes, recipe).to(device)
        head.learn_inputs(train.features)
        if recipe.head == "linear":
            result = Fit(head, [_linear_record(head, recipe, n_classes, train, val, groups)], 1)
        else:
            result = _Training(head, recipe, n_classes, train, device).run(val, schedule, on_epoch, score_train)
        head.eval()
        return result


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the matrices are small, and threads that wait for a busy core cost ten times as much.

    So a head is also the same to the bit in a process of its own as among others.
    """
    threads = torch.get_num_threads()
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
        if size > _STANDARDISED_BYTES:
            return cls(features, image, text, views, classes, False)
        image, text, _ = head.standardised(Batch(image.float(), text.float()))
        if views is not None and head.image_input is not None:
            views = head.image_input(views.flatten(0, 1).float()).unflatten(0, views.shape[:2])
        return cls(features, image, text, views, classes, True)


class _Training:
    """One head on its way: the training rows on the device, the loss, the optimizer."""

    def __init__(self, head: Head, recipe: Recipe, n_classes: int, train: Rows, device: str) -> None:
        self.head, self.recipe, self.n_classes, self.train, self.device = head, recipe, n_classes, train, device
        features = train.features
        # The order of rows depends on the seed alone, so that it is the same for every fusion.
        self.order = torch.Generator().manual_seed(recipe.seed)
        # A stream of its own: with the seed of the order, a row's view would depend on its place in the epoch.
        of_views = int(np.random.SeedSequence([recipe.seed, 1]).generate_state(1)[0])
        self.which_view = torch.Generator().manual_seed(of_views)
        self.resident = None if features.places is not None else _Resident.of(train, head, device)
        if recipe.views and features.views is None:
            raise MmcliError("this recipe trains on augmented views, but these features have none")
        self.loss: Loss = make_loss(recipe, np.bincount(train.classes, minlength=n_classes), device)
        attention = [each for name, each in head.named_parameters() if name.startswith("fusion.attention.")]
        others = [each for name, each in head.named_parameters() if not name.startswith("fusion.attention.")]
        groups = [(others, recipe.lr)] + ([(attention, recipe.lr_attn)] if attention else [])
        self.optimizer = AdamW(groups, recipe.weight_decay)

    def run(self, val: Rows | None, schedule: list[float] | None, on_epoch: OnEpoch | None, score_train: bool) -> Fit:
        recipe, head = self.recipe, self.head
        plateau = Plateau(recipe.lr_factor, recipe.lr_patience)
        result, best, best_state, last_rise = Fit(head), (-1.0, 0.0), head.state_dict(), 0
        for epoch in range(1, (recipe.epochs if schedule is None else len(schedule)) + 1):
            if schedule is not None:
                self.optimizer.factor = schedule[epoch - 1] / recipe.lr
            record: dict[str, float] = {"epoch": epoch, "lr": recipe.lr * self.optimizer.factor}
            record["train_loss"] = self._epoch(epoch)
            head.eval()
            if score_train:
                scores = scores_of_part(self._training_logits(), self.train.classes, self.n_classes, "train")
                record["train_macro_f1"] = scores["train_macro_f1"]
            if val is not None:
                parts = predict_parts(head, val.features)
                true = torch.from_numpy(val.classes).to(self.device)
                record["val_loss"] = float(torch.stack([self.loss(logits, true) for logits in parts]).mean())
                record |= scores_of_part(parts.mean(dim=0), val.classes, self.n_classes, "val")
            result.history.append(record)
            if on_epoch is not None:
                on_epoch(record)
            if val is None:
                result.best_epoch = epoch
                continue
            self.optimizer.factor = plateau.step(record["val_macro_f1"])
            if record["val_macro_f1"] > best[0]:
                last_rise = epoch
            reached = (record["val_macro_f1"], -record["val_loss"])  # of equal F1, the lower loss
            if reached > best:
                best, result.best_epoch = reached, epoch
                best_state = {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}
            if epoch - last_rise >= recipe.patience:
                break
        if val is not None:
            head.load_state_dict(best_state)
        return result

    def _epoch(self, epoch: int) -> float:
        """Take one step per batch of shuffled rows; return the mean loss."""
        head = self.head.train()
        losses = []
        for block in self._blocks():
            # In one piece: a small result after each step would keep the memory of the large ones beside it.
            of_block = torch.zeros(math.ceil(len(block.classes) / self.recipe.batch_size), device=self.device)
            losses.append(of_block)
            steps = 0
            for batch, classes in self._batches(block):
                parts = head.each(batch if block.is_standardised else head.standardised(batch))
                loss = functools.reduce(operator.add, (self.loss(logits, classes) for logits in parts))
                loss.backward()
                self.optimizer.step()
                of_block[steps] = loss.detach() / len(parts)
                steps += 1
            losses[-1] = of_block[:steps]
        mean = float(torch.cat(losses).mean())
        if not math.isfinite(mean):
            raise MmcliError(f"training diverged in epoch {epoch} (loss {mean}): lower --lr")
        return mean

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
        size = self.recipe.batch_size
        order = torch.randperm(len(block.classes), generator=self.order)
        if len(order) % size == 1:
            order = order[:-1]  # BatchNorm has no variance for a batch of one row
        if not len(order):
            return
        view = None
        if self.recipe.views and block.views is not None:
            view = torch.randint(block.views.shape[1], (len(block.classes),), generator=self.which_view).to(self.device)
        tokens = token_batches(block.features, self.head.needs_tokens, order.numpy(), size, self.device)
        order = order.to(self.device)
        for start, states in zip(range(0, len(order), size), tokens, strict=True):
            rows = order[start : start + size]
            if view is None or block.views is None:
                image = block.image.index_select(0, rows)
            else:
                image = block.views[rows, view.index_select(0, rows)]
            text, classes = (each.index_select(0, rows) for each in (block.text, block.classes))
            yield Batch(image.float(), text.float(), states), classes


def scores_of_part(logits: Tensor, classes: NDArray[np.int64], n_classes: int, part: str) -> dict[str, float]:
    """Return ``<part>_macro_f1`` and ``<part>_accuracy``."""
    scores = quick_scores(classes, logits.argmax(dim=1).cpu().numpy(), n_classes)
    return {f"{part}_{name}": value for name, value in scores.items()}


def predict_parts(head: Head, features: Features) -> Tensor:
    """Return the logits of each MLP of a head, (k, n, C), of n pairs."""
    with torch.inference_mode():
        return _by_batch(head, features, lambda batch: head.parts(head.standardised(batch)).transpose(0, 1)).transpose(
            0, 1
        )


def predict_logits(head: Head | Ensemble, features: Features) -> NDArray[np.float32]:
    """Return the logits, (n, C) float32, of n pairs."""
    with one_thread(), torch.inference_mode():
        logits: NDArray[np.float32] = _by_batch(head, features, head).float().cpu().numpy()
    return logits


def _by_batch(head: Head | Ensemble, features: Features, compute: Callable[[Batch], Tensor]) -> Tensor:
    """Return what ``compute`` makes of each row, (n, ...)."""
    device = str(next(head.parameters()).device)
    ordered, back = features.in_file_order()
    found, start = torch.empty(0), 0
    for batch in batches(ordered, head.needs_tokens, device):
        computed = compute(batch)
        if start == 0:  # in one piece: small results between large intermediate ones would keep the memory of these
            found = computed.new_empty((len(features), *computed.shape[1:]))
        found[start : start + len(computed)] = computed
        start += len(computed)
    return found if features.places is None else found[torch.from_numpy(back).to(device)]
