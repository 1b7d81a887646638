"""Training a head on embeddings in memory."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..cache.errors import MmcliError
from .losses import class_weights
from .metrics import accuracy, confusion_matrix, macro_f1
from .model import Head


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a head is trained. The defaults: docs/decisions.md.

    Attributes
    ----------
    fusion, modality
        What the head sees.
    hidden, dropout
        The MLP.
    lr, weight_decay, batch_size
        Of AdamW.
    epochs
        At most this many.
    patience
        Stop after this many epochs without a better validation macro-F1.
    lr_factor, lr_patience
        ReduceLROnPlateau on validation macro-F1.
    class_weights
        ``none``, ``inverse``, ``sqrt`` or ``effective``.
    seed
        Of initial weights, order of rows and dropout.
    """

    fusion: str = "concat"
    modality: str = "both"
    hidden: tuple[int, ...] = (256, 64)
    dropout: float = 0.5
    lr: float = 3e-4
    weight_decay: float = 0.05
    batch_size: int = 64
    epochs: int = 60
    patience: int = 12
    lr_factor: float = 0.5
    lr_patience: int = 4
    class_weights: str = "sqrt"
    seed: int = 42

    def __post_init__(self) -> None:
        for name, least in (("lr", 0), ("batch_size", 1), ("epochs", 0), ("patience", 0)):
            if not least < getattr(self, name) < math.inf:  # so that NaN is refused, too
                raise MmcliError(f"{name} must be above {least}, found {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise MmcliError(f"dropout must be in [0, 1), found {self.dropout}")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data."""
        return asdict(self) | {"hidden": list(self.hidden)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Return the recipe that ``to_dict`` described."""
        return cls(**{**values, "hidden": tuple(values["hidden"])})


@dataclass(frozen=True)
class Rows:
    """Embeddings and classes of some rows: image and text (n, d) float32, classes (n,) int64."""

    image: NDArray[np.float32]
    text: NDArray[np.float32]
    classes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.classes)


@dataclass
class Fit:
    """A trained head.

    Attributes
    ----------
    head
        In evaluation mode, with the weights of the best epoch.
    history
        One dict per epoch: epoch, lr, train_loss, train_macro_f1, and val_loss, val_macro_f1, val_accuracy where
        there were validation rows.
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
    on_epoch: Callable[[dict[str, float]], None] | None = None,
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
        Learning rate of each epoch; only without ``val``.
    device
        A torch device.
    on_epoch
        Called with each entry of the history.
    """
    if len(train) < 2:
        raise MmcliError(f"{len(train)} training row: at least two are needed")
    with _one_thread(), torch.random.fork_rng(devices=[device] if device == "cuda" else []):
        torch.manual_seed(recipe.seed)
        return _fit(recipe, n_classes, train, val, schedule, device, on_epoch)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: the matrices are small, and threads that wait for a busy core cost ten times as much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(
    recipe: Recipe,
    n_classes: int,
    train: Rows,
    val: Rows | None,
    schedule: list[float] | None,
    device: str,
    on_epoch: Callable[[dict[str, float]], None] | None,
) -> Fit:
    head = Head(train.image.shape[1], n_classes, recipe.fusion, recipe.modality, recipe.hidden, recipe.dropout)
    head.to(device)
    raw = [torch.from_numpy(array).to(device) for array in (train.image, train.text)]
    head.learn_inputs(*raw)
    inputs, classes = head.standardised(*raw), torch.from_numpy(train.classes).to(device)
    del raw
    held_out = None if val is None else [torch.from_numpy(array).to(device) for array in (val.image, val.text)]
    weights = class_weights(np.bincount(train.classes, minlength=n_classes), recipe.class_weights)
    weight = torch.from_numpy(weights).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=recipe.lr_factor, patience=recipe.lr_patience
    )
    result, best, best_state, last_rise = Fit(head), (-1.0, 0.0), head.state_dict(), 0
    for epoch in range(1, (recipe.epochs if schedule is None else len(schedule)) + 1):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = schedule[epoch - 1]
        record: dict[str, float] = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        head.train()
        losses = [
            _step(head, optimizer, inputs[0][batch], inputs[1][batch], classes[batch], weight)
            for batch in _batches(len(train), recipe.batch_size, device)
        ]
        record["train_loss"] = float(torch.stack(losses).mean())
        if not math.isfinite(record["train_loss"]):
            raise MmcliError(f"training diverged in epoch {epoch} (loss {record['train_loss']}): lower --lr")
        head.eval()
        with torch.inference_mode():
            record["train_macro_f1"] = _scores(head.classify(*inputs), train.classes, n_classes)[0]
            if held_out is not None and val is not None:
                logits = head(*held_out)
                target = torch.from_numpy(val.classes).to(device)
                record["val_loss"] = float(functional.cross_entropy(logits, target, weight))
                record["val_macro_f1"], record["val_accuracy"] = _scores(logits, val.classes, n_classes)
        result.history.append(record)
        if on_epoch is not None:
            on_epoch(record)
        if held_out is None:
            result.best_epoch = epoch
            continue
        plateau.step(record["val_macro_f1"])
        if record["val_macro_f1"] > best[0]:
            last_rise = epoch
        reached = (record["val_macro_f1"], -record["val_loss"])  # of equal F1, the lower loss
        if reached > best:
            best, result.best_epoch = reached, epoch
            best_state = {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}
        if epoch - last_rise >= recipe.patience:
            break
    if held_out is not None:
        head.load_state_dict(best_state)
    head.eval()
    return result


def _batches(n: int, size: int, device: str) -> Iterator[Tensor]:
    """Yield shuffled row numbers; a last batch of one row is left out, BatchNorm has no variance for it."""
    order = torch.randperm(n).to(device)
    for start in range(0, n, size):
        if n - start > 1:
            yield order[start : start + size]


def _step(
    head: Head, optimizer: torch.optim.Optimizer, image: Tensor, text: Tensor, classes: Tensor, weight: Tensor
) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = functional.cross_entropy(head.classify(image, text), classes, weight)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _scores(logits: Tensor, classes: NDArray[np.int64], n_classes: int) -> tuple[float, float]:
    confusion = confusion_matrix(classes, logits.argmax(dim=1).cpu().numpy(), n_classes)
    return float(macro_f1(confusion)), float(accuracy(confusion))


def predict_logits(head: Head, image: NDArray[np.float32], text: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return logits, (n, C) float32, of embeddings, (n, d) each."""
    device = next(head.parameters()).device
    with _one_thread(), torch.inference_mode():
        logits = head(torch.from_numpy(image).to(device), torch.from_numpy(text).to(device))
    array: NDArray[np.float32] = logits.float().cpu().numpy()
    return array
