"""The plan of a fit, in which the stages differ: groups of parameters, epochs, and schedule of the learning rate."""

import math
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from ..model.head import Head
from ..recipe import FinetuneRecipe, Recipe


@dataclass(frozen=True)
class Plan:
    """Plan of one fit.

    Attributes
    ----------
    groups
        Parameters and their learning rates, as ``torch.optim`` takes them.
    epochs, patience, batch_size
        Train for at most ``epochs`` epochs; stop after ``patience`` epochs without a better validation score.
    steps
        Number of steps in ``epochs`` epochs.
    rate_options
        Options that the user should lower when training diverges.
    finetune
        The recipe of stage 2, with its warm-up and decay; None in stage 1.
    rates
        In stage 1, factor of the learning rates in each epoch of the fit that is repeated; None: ReduceLROnPlateau.
    plateau
        Factor and patience of ReduceLROnPlateau.
    """

    groups: list[dict[str, Any]]
    epochs: int
    patience: int
    batch_size: int
    steps: int
    rate_options: str
    finetune: FinetuneRecipe | None
    rates: list[float] | None
    plateau: tuple[float, int]

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """Return the scheduler of the learning rates of ``optimizer``."""
        finetune, rates = self.finetune, self.rates
        if finetune is not None:
            steps = self.steps // self.epochs * finetune.epochs
            return LambdaLR(optimizer, lambda step: finetune.factor(step, steps) if step < steps else 0.0)
        if rates is not None:
            return LambdaLR(optimizer, lambda epoch: rates[min(epoch, len(rates) - 1)])
        factor, patience = self.plateau
        return ReduceLROnPlateau(optimizer, mode="max", factor=factor, patience=patience, eps=0)

    def after_step(self, scheduler: LRScheduler) -> None:
        """Update the learning rates after a step, if the schedule counts steps."""
        if self.finetune is not None:
            scheduler.step()

    def after_epoch(self, scheduler: LRScheduler, score: float | None) -> None:
        """Update the learning rates after an epoch, if the schedule counts epochs."""
        if isinstance(scheduler, ReduceLROnPlateau):
            if score is not None:
                scheduler.step(score)
        elif self.finetune is None:
            scheduler.step()


def plan_of(recipe: Recipe, head: Head, n_rows: int, rates: list[float] | None = None) -> Plan:
    """Return the plan for ``head`` on ``n_rows`` rows: by ``recipe``, or with ``tops`` by ``recipe.finetune``.

    Parameters
    ----------
    rates
        Learning rate of each epoch of an earlier fit that is repeated.
    """
    settings: Recipe | FinetuneRecipe = recipe
    if head.tops:
        assert recipe.finetune is not None
        settings = recipe.finetune
    rows = n_rows - (n_rows % settings.batch_size == 1)  # the loop leaves out a batch of one row
    epochs = settings.epochs if rates is None else len(rates)
    return Plan(
        groups=_groups(recipe, head),
        epochs=epochs,
        patience=settings.patience,
        batch_size=settings.batch_size,
        steps=epochs * math.ceil(rows / settings.batch_size),
        rate_options="--lr-backbone or --lr-head" if head.tops else "--lr",
        finetune=recipe.finetune if head.tops else None,
        rates=None if rates is None else [rate / recipe.lr for rate in rates],
        plateau=(recipe.lr_factor, recipe.lr_patience),
    )


def _groups(recipe: Recipe, head: Head) -> list[dict[str, Any]]:
    own = head.own_parameters()
    if head.tops and recipe.finetune is not None:
        return [
            {"params": list(head.unfrozen().values()), "lr": recipe.finetune.lr_backbone},
            {"params": list(own.values()), "lr": recipe.finetune.lr_head},
        ]
    attention = [weight for name, weight in own.items() if name.startswith("fusion.attention.")]
    others = [weight for name, weight in own.items() if not name.startswith("fusion.attention.")]
    groups = [{"params": others, "lr": recipe.lr}]
    return groups + ([{"params": attention, "lr": recipe.lr_attn}] if attention else [])
