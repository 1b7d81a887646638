"""Training a head: one loop for both stages.

In stage 1 the head sees frozen embeddings, in memory or left in the file. In stage 2 the head has ``tops``, the last
layers of the backbone, and sees the states that enter them. The stages differ only in the source of a batch, the groups
of parameters and the schedule of the learning rate.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from ...cache.errors import MmcliError
from ...featurize.backbones.tensors import enough_memory
from ..evaluation.metrics import quick_scores
from ..model.head import Head, one_thread, predict_logits, predict_parts, sizes_of
from ..model.inputs import Rows
from ..model.losses import LossFunction, make_loss
from ..recipe import FinetuneRecipe, Recipe
from .linear import fit_linear
from .training_rows import TrainingRows, steps_per_epoch


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

    ``groups``, (n,), are those of the training rows: the inner folds of a linear head keep the rows of a group
    together. ``rates`` are the learning rates of the epochs of an earlier fit, to be repeated without validation rows;
    default: the schedule of the recipe. ``score_train`` adds the macro-F1 of the training rows to the history, which
    takes a pass over them per epoch. ``on_epoch`` is called with each entry of the history, and ``on_step`` with (steps
    done, steps at most). ``keep`` is called after each epoch with the state of the fit. From the last such state an
    interrupted fit can ``resume``; only a fit with ``tops`` then gives the same bits as an uninterrupted one.
    """

    device: str = "cpu"
    groups: NDArray[np.int64] | None = None
    rates: list[float] | None = None
    score_train: bool = True
    on_epoch: Callable[[dict[str, float]], None] | None = None
    on_step: Callable[[int, int], None] | None = None
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
    if len(train) < 2:
        raise MmcliError(f"training needs at least two rows, found {len(train)}: label more pairs")
    options = options or FitOptions()
    device = options.device
    batch_size = recipe.batch_size if recipe.finetune is None else recipe.finetune.batch_size
    with own_random(device), one_thread(start is None or start.is_small), enough_memory(device, batch_size):
        if start is not None:
            fitted = _Training(start.to(device), recipe, train, options).run(val)
        else:
            torch.manual_seed(recipe.seed)
            head = Head(sizes_of(train.features), n_classes, recipe).to(device)
            head.learn_inputs(train.features)
            if recipe.head == "linear":
                fitted = _fit_linear_head(head, recipe, train, val, options)
            else:
                fitted = _Training(head, recipe, train, options).run(val)
    fitted.head.eval()
    return fitted


def own_random(device: str) -> contextlib.AbstractContextManager[None]:
    """Restore the global random generators of the CPU and of ``device`` afterwards."""
    kind = torch.device(device).type
    return torch.random.fork_rng([] if kind == "cpu" else [device], device_type="cuda" if kind == "cpu" else kind)


def _fit_linear_head(head: Head, recipe: Recipe, train: Rows, val: Rows | None, options: FitOptions) -> Fit:
    record: dict[str, float] = {"epoch": 1, "C": fit_linear(head, recipe, train, options.groups)}
    head.eval()
    loss = make_loss(recipe, np.bincount(train.classes, minlength=head.n_classes), "cpu")
    for part, rows in (("train", train), ("val", val)):
        if rows is not None:
            logits = torch.from_numpy(predict_logits(head, rows.features))
            record[f"{part}_loss"] = float(loss(logits, torch.from_numpy(rows.classes)))
            record |= _scores_of_part(logits, rows, part)
    return Fit(head, [record], 1)


def _scores_of_part(logits: Tensor, rows: Rows, part: str) -> dict[str, float]:
    """Return ``<part>_macro_f1`` and ``<part>_accuracy`` of logits (n, C)."""
    scores = quick_scores(rows.classes, logits.argmax(dim=1).cpu().numpy(), logits.shape[1])
    return {f"{part}_{name}": value for name, value in scores.items()}


class _Training:
    """The state of one fit: batches, loss, optimizer, schedule, and the epochs so far.

    ``finetune`` is None in stage 1, also where the recipe goes on with a stage 2.
    """

    def __init__(self, head: Head, recipe: Recipe, train: Rows, options: FitOptions) -> None:
        self.head, self.recipe, self.train, self.options = head, recipe, train, options
        self.finetune = recipe.finetune if head.tops else None
        settings: Recipe | FinetuneRecipe = self.finetune or recipe
        self.epochs = settings.epochs if options.rates is None else len(options.rates)
        self.patience = settings.patience
        self.rows = TrainingRows(train, head, recipe, settings.batch_size, options.device)
        self.steps_per_epoch = steps_per_epoch(train.features, settings.batch_size)
        self.loss: LossFunction = make_loss(
            recipe, np.bincount(train.classes, minlength=head.n_classes), options.device
        )
        self.optimizer = AdamW(self._groups(), weight_decay=recipe.weight_decay, fused=True)
        self.scheduler = self._scheduler()
        self.fit = Fit(head)
        self.best: tuple[float, float] = (-1.0, 0.0)  # macro-F1, and minus the loss, which decides between equal ones
        self.last_rise, self.steps_done = 0, 0
        self.best_weights = head.weights()
        if options.resume is not None:
            self._load(options.resume)

    def _groups(self) -> list[dict[str, Any]]:
        """Return the parameters by learning rate, as ``torch.optim`` takes them."""
        own = {name: weight for name, weight in self.head.named_parameters() if not name.startswith("tops.")}
        if self.finetune is not None:
            return [
                {"params": list(self.head.unfrozen().values()), "lr": self.finetune.lr_backbone},
                {"params": list(own.values()), "lr": self.finetune.lr_head},
            ]
        rate_of = {name: self.head.fusion.rate if name.startswith("fusion.") else "lr" for name in own}
        return [
            {"params": [own[name] for name in own if rate_of[name] == rate], "lr": getattr(self.recipe, rate)}
            for rate in dict.fromkeys(("lr", self.head.fusion.rate))
        ]

    def _scheduler(self) -> LRScheduler:
        """Return the schedule of the rates: by step in stage 2, else by epoch."""
        recipe, finetune, rates = self.recipe, self.finetune, self.options.rates
        if finetune is not None:
            steps = self.steps_per_epoch * finetune.epochs
            return LambdaLR(self.optimizer, lambda step: finetune.factor(step, steps))
        if rates is not None:
            return LambdaLR(self.optimizer, lambda epoch: rates[min(epoch, len(rates) - 1)] / recipe.lr)
        return ReduceLROnPlateau(self.optimizer, "max", recipe.lr_factor, recipe.lr_patience, eps=0)

    def run(self, val: Rows | None) -> Fit:
        """Train all epochs, or with ``val`` until patience ends, and load the weights of the best epoch."""
        history = self.fit.history
        while len(history) < self.epochs and not (history and len(history) - self.last_rise >= self.patience):
            epoch = len(history) + 1
            loss, rate = self._epoch(epoch)
            record: dict[str, float] = {"epoch": epoch, "lr": rate, "train_loss": loss}
            self.head.eval()
            if self.options.score_train:
                record["train_macro_f1"] = _scores_of_part(self.rows.logits(), self.train, "train")["train_macro_f1"]
            if val is None:
                self.last_rise = self.fit.best_epoch = epoch
            else:
                record |= self._score(val)
                if record["val_macro_f1"] > self.best[0]:
                    self.last_rise = epoch
                reached = (record["val_macro_f1"], -record["val_loss"])
                if reached > self.best:
                    self.best, self.fit.best_epoch, self.best_weights = reached, epoch, self.head.weights()
            if isinstance(self.scheduler, ReduceLROnPlateau):
                if val is not None:
                    self.scheduler.step(record["val_macro_f1"])
            elif self.finetune is None:
                self.scheduler.step()
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
        true = torch.from_numpy(val.classes).to(self.options.device)
        record = {"val_loss": float(torch.stack([self.loss(logits, true) for logits in parts]).mean())}
        return record | _scores_of_part(parts.mean(dim=0), val, "val")

    def _epoch(self, epoch: int) -> tuple[float, float]:
        """Take one step per batch of shuffled rows; return the mean loss, and the learning rate of the last step."""
        head, groups = self.head.train(), self.optimizer.param_groups
        if self.finetune is not None:
            self.rows.reseed(epoch)
        # One allocation, because small results between large ones would fragment the memory.
        losses = torch.zeros(self.steps_per_epoch, device=self.options.device)
        steps, rate = 0, groups[0]["lr"]
        for batch, classes in self.rows.batches():
            by_mlp = head.parts(batch)
            loss = torch.stack([self.loss(logits, classes) for logits in by_mlp]).sum()
            loss.backward()
            rate = groups[0]["lr"]
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.finetune is not None:
                self.scheduler.step()
            losses[steps] = loss.detach() / len(by_mlp)
            steps += 1
            self.steps_done += 1
            if self.options.on_step is not None:
                self.options.on_step(self.steps_done, self.epochs * self.steps_per_epoch)
        mean = float(losses[:steps].mean())
        if not math.isfinite(mean):
            rates = "--lr" if self.finetune is None else "--lr-backbone or --lr-head"
            raise MmcliError(f"training diverged in epoch {epoch} (loss {mean}): lower {rates}")
        return mean, rate

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
