"""Training the top of the backbone together with a head."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.errors import MmcliError
from ..featurize.backbones.tensors import enough_memory
from ..heads.model.losses import make_loss
from ..heads.recipe import Recipe
from ..heads.training.loop import one_thread, own_random, scores_of_part
from ..heads.training.optimizer import AdamW
from .model import Finetuned, StateRows, predict_parts, state_batches
from .recipe import FinetuneRecipe

OnStep = Callable[[int, int], None]
OnEpoch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Labelled:
    """Rows and their class numbers, (n,) int64."""

    rows: StateRows
    classes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.classes)


@dataclass
class FinetuneFit:
    """What became of one model.

    Attributes
    ----------
    model
        In evaluation mode, with the weights of the best epoch.
    history
        One dict per epoch: epoch, lr (of the backbone, in its last step), train_loss, train_macro_f1 (where asked for),
        val_loss, val_macro_f1, val_accuracy.
    best_epoch
        1 for the first.
    """

    model: Finetuned
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0


def finetune_fit(
    model: Finetuned,
    recipe: Recipe,
    settings: FinetuneRecipe,
    n_classes: int,
    train: Labelled,
    val: Labelled,
    device: str = "cpu",
    resume: dict[str, Any] | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    score_train: bool = True,
) -> FinetuneFit:
    """Train ``model`` in place; stop by, and keep the weights of the epoch with, the best macro-F1 of ``val``.

    Parameters
    ----------
    model
        As stage 1 left it.
    recipe
        Of stage 1: loss, class weights, weight decay and seed are taken from it.
    settings
        Of stage 2.
    resume
        What ``on_epoch`` was given last by an interrupted fit of the same.
    on_step
        Called with (steps done, steps at most).
    on_epoch
        Called with what is needed to go on from the end of an epoch.
    score_train
        Whether the history says how well the training rows are fitted, which takes a pass over them per epoch.

    Raises
    ------
    MmcliError
        The loss is not finite, or the device has no room for a batch.
    """
    threads = one_thread() if model.is_small else contextlib.nullcontext()
    seeded = own_random(device)
    with threads, seeded, enough_memory(device, settings.batch_size):
        made = _Training(model, recipe, settings, n_classes, train, val, device)
        if resume is not None:
            made.load(resume)
        return made.run(on_step, on_epoch, score_train)


class _Training:
    """One model on its way."""

    def __init__(
        self,
        model: Finetuned,
        recipe: Recipe,
        settings: FinetuneRecipe,
        n_classes: int,
        train: Labelled,
        val: Labelled,
        device: str,
    ) -> None:
        if len(train) < 2:
            raise MmcliError(f"{len(train)} training row: at least two are needed")
        self.model, self.recipe, self.settings, self.n_classes = model.to(device), recipe, settings, n_classes
        self.train, self.val, self.device = train, val, device
        self.loss = make_loss(recipe, np.bincount(train.classes, minlength=n_classes), device)
        groups = [(model.unfrozen(), settings.lr_backbone), (list(model.head.parameters()), settings.lr_head)]
        self.optimizer = AdamW(groups, recipe.weight_decay)
        self.fit = FinetuneFit(model)
        self.best: tuple[float, float] = (-1.0, 0.0)  # macro-F1, and of equal ones the lower loss
        self.last_rise = 0
        self.best_weights = model.weights()
        # BatchNorm has no variance for a batch of one row.
        self.rows_per_epoch = len(train) - (len(train) % settings.batch_size == 1)
        self.steps_per_epoch = math.ceil(self.rows_per_epoch / settings.batch_size)

    def run(self, on_step: OnStep | None, on_epoch: OnEpoch | None, score_train: bool) -> FinetuneFit:
        for epoch in range(len(self.fit.history) + 1, self.settings.epochs + 1):
            if self.fit.history and epoch - 1 - self.last_rise >= self.settings.patience:
                break
            record: dict[str, float] = {"epoch": epoch}
            record["train_loss"] = self._epoch(epoch, on_step)
            record["lr"] = self.settings.lr_backbone * self.optimizer.factor
            if score_train:
                scores = scores_of_part(
                    self._logits(self.train).mean(dim=0), self.train.classes, self.n_classes, "train"
                )
                record["train_macro_f1"] = scores["train_macro_f1"]
            parts = self._logits(self.val)
            true = torch.from_numpy(self.val.classes).to(self.device)
            record["val_loss"] = float(torch.stack([self.loss(logits, true) for logits in parts]).mean())
            record |= scores_of_part(parts.mean(dim=0), self.val.classes, self.n_classes, "val")
            self._note(epoch, record)
            if on_epoch is not None:
                on_epoch(self.state())
        self.model.load_weights(self.best_weights)
        self.model.eval()
        return self.fit

    def _note(self, epoch: int, record: dict[str, float]) -> None:
        self.fit.history.append(record)
        if record["val_macro_f1"] > self.best[0]:
            self.last_rise = epoch
        reached = (record["val_macro_f1"], -record["val_loss"])
        if reached > self.best:
            self.best, self.fit.best_epoch, self.best_weights = reached, epoch, self.model.weights()

    def _epoch(self, epoch: int, on_step: OnStep | None) -> float:
        """Take one step per batch of shuffled rows; return the mean loss."""
        # Order and dropout depend on seed and epoch alone, so that a resumed fit is the same.
        random = np.random.default_rng([self.recipe.seed, epoch])
        torch.manual_seed(int(random.integers(2**63)))
        order = random.permutation(len(self.train))[: self.rows_per_epoch]
        done, steps = (epoch - 1) * self.steps_per_epoch, self.settings.epochs * self.steps_per_epoch
        classes = torch.from_numpy(self.train.classes[order]).to(self.device)
        size = self.settings.batch_size
        losses = []
        self.model.train()
        batches = state_batches(self.train.rows, self.model, order, size, self.device)
        for number, (batch, states) in enumerate(batches):
            parts = self.model.parts(batch, states)
            true = classes[number * size : (number + 1) * size]
            loss = torch.stack([self.loss(logits, true) for logits in parts]).sum()
            loss.backward()
            self.optimizer.factor = self.settings.factor(done + number, steps)
            self.optimizer.step()
            losses.append(loss.detach() / len(parts))
            if on_step is not None:
                on_step(done + number + 1, steps)
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise MmcliError(f"training diverged in epoch {epoch} (loss {mean}): lower --lr-backbone or --lr-head")
        return mean

    def _logits(self, labelled: Labelled) -> Tensor:
        return predict_parts(self.model, labelled.rows, self.device)

    def state(self) -> dict[str, Any]:
        """Return, in main memory, all that is needed to go on."""
        return {
            "now": self.model.weights(),
            "optimizer": [[each.cpu().clone() for each in group] for group in self.optimizer.state()],
            "history": self.fit.history,
            "best": {"weights": self.best_weights, "reached": list(self.best), "epoch": self.fit.best_epoch},
            "last_rise": self.last_rise,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` returned."""
        self.model.load_weights(state["now"])
        self.optimizer.load_state(state["optimizer"])
        best = state["best"]
        self.fit.history, self.fit.best_epoch = list(state["history"]), best["epoch"]
        self.best, self.last_rise = (best["reached"][0], best["reached"][1]), state["last_rise"]
        self.best_weights = best["weights"]
