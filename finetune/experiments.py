"""Stage 2 as a candidate of ``compare`` and ``sweep``: same folds and seeds as the head that it goes on from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.store import FeatureCache
from ..featurize.backbones.opening import moved_to
from ..featurize.backbones.towers import Top
from ..heads.evaluation.folds import Fold
from ..heads.evaluation.metrics import quick_scores
from ..heads.experiments import candidates_of
from ..heads.experiments.fits import Candidate, Continued, Data
from ..heads.experiments.tuning import OF_STAGE_2
from ..heads.model.head import Head
from ..heads.model.inputs import Rows
from ..heads.model.losses import fit_offsets
from ..heads.recipe import Recipe
from ..heads.recipe import parse_setting as parse_of_head
from ..heads.training.loop import predict_logits as predict_frozen
from .model import Finetuned, StateRows, predict_logits
from .recipe import FinetuneRecipe, parse_setting, recipe_for
from .source import Source
from .states import States
from .store import OnProgress, StateStore
from .training import Labelled, finetune_fit

SUFFIX = ":finetune"
# Settings of a head on which stage 2 depends even where stage 1 does not: a linear head has no training loop.
USES = ("class_weights", "focal_gamma", "label_smoothing", "logit_adjustment", "loss", "weight_decay")


def parse_grid_setting(name: str, text: str) -> Any:
    """Read a setting of a grid: of a head, or, as ``finetune.<name>``, of stage 2."""
    if name.startswith(OF_STAGE_2):
        return parse_setting(name.removeprefix(OF_STAGE_2), text)
    return parse_of_head(name, text)


class Stage2:
    """What stage 2 needs, opened once for all candidates that have it.

    Parameters
    ----------
    cache
        What ``featurize`` wrote.
    settings
        Of ``FinetuneRecipe``, by name; the others have their defaults.
    data, backbone
        Where the raw pairs and the backbone are now; default: as recorded in the cache.
    on_states
        Called with (pairs computed, pairs to compute) while the frozen part is computed.
    """

    def __init__(
        self,
        cache: str | Path,
        settings: Mapping[str, Any] | None = None,
        data: str | Path | None = None,
        backbone: str | None = None,
        on_states: OnProgress | None = None,
    ) -> None:
        self.cache, self.settings, self.data, self.backbone = cache, dict(settings or {}), data, backbone
        self.on_states = on_states
        self._tops: dict[tuple[str, int], Top] = {}
        self._states: dict[tuple[str | int, ...], States] = {}

    def after(self, modality: str, settings: Mapping[str, Any] | None = None) -> AfterStage1:
        """Return what goes on after heads of ``modality`` were fitted."""
        return AfterStage1(self, recipe_for(modality, self.settings | dict(settings or {})))

    def candidates_of(self, names: Sequence[str], recipe: Recipe) -> list[Candidate]:
        """Return a candidate per name, as ``heads.experiments``; ``<name>:finetune`` goes on with stage 2."""
        found = []
        for name in names:
            (candidate,) = candidates_of([name.removesuffix(SUFFIX)], recipe)
            if name.endswith(SUFFIX):
                candidate = replace(candidate, name=name, then=self.after(recipe.modality))
            found.append(candidate)
        return found

    @cached_property
    def source(self) -> Source:
        """Where the backbone of the cache and its raw pairs are."""
        with FeatureCache.open(self.cache) as cache:
            of = cache.header
        return Source(of.identity, moved_to(of.backbone, self.backbone), data=self.data)

    def get(self, layers: Mapping[str, int], guids: Sequence[str]) -> tuple[dict[str, Top], dict[str, States]]:
        """Return the tops of towers, and the states of ``guids`` in their order."""
        for tower, count in layers.items():
            if (tower, count) not in self._tops:
                self._tops[tower, count] = self.source.tops({tower: count})[tower]
            if (tower, count, *guids) not in self._states:
                with FeatureCache.open(self.cache) as cache:
                    states = StateStore(cache, tower, count, self.source).states(guids, self.on_states)
                self._states[tower, count, *guids] = states
        self.source.forget()
        return (
            {tower: self._tops[tower, count] for tower, count in layers.items()},
            {tower: self._states[tower, count, *guids] for tower, count in layers.items()},
        )


@dataclass(frozen=True)
class AfterStage1:
    """Stage 2 with one set of settings (a ``Continuation``)."""

    stage2: Stage2
    settings: FinetuneRecipe
    uses: tuple[str, ...] = USES

    def key(self) -> dict[str, Any]:
        """Return what the result depends on."""
        return {"stage2": 1, "transformers": version("transformers"), **self.settings.to_dict()}

    def prepare(self, data: Data) -> ReadyStage2:
        """Compute what is frozen of the rows, or find it beside the cache."""
        layers = self.stage2.source.resolved(self.settings).layers()
        return ReadyStage2(self.settings, *self.stage2.get(layers, data.guids))


@dataclass(frozen=True)
class ReadyStage2:
    """Stage 2 for certain rows: it can be sent to another process."""

    settings: FinetuneRecipe
    tops: dict[str, Top]
    states: dict[str, States]

    def __call__(self, head: Head, recipe: Recipe, n_classes: int, rows: Rows, fold: Fold) -> Continued:
        """Train on, and return the logits of the stage that is better on the rows that the fold is stopped by."""
        model = Finetuned(copy.deepcopy(self.tops), copy.deepcopy(head))
        all_rows = StateRows(rows.features, self.states)
        train, stop = (Labelled(all_rows.take(part), rows.classes[part]) for part in (fold.train, fold.stop))
        found = finetune_fit(model, recipe, self.settings, n_classes, train, stop, score_train=False)
        of_stop = predict_logits(model, stop.rows, "cpu")
        frozen = predict_frozen(head, stop.rows.features)

        def reached(logits: NDArray[np.float32]) -> float:
            decided = logits + fit_offsets(logits, stop.classes) if recipe.offsets else logits
            return quick_scores(stop.classes, decided.argmax(axis=1), n_classes)["macro_f1"]

        if reached(of_stop) > reached(frozen):
            of_test = predict_logits(model, all_rows.take(fold.test), "cpu")
        else:  # as `finetune` does, which then keeps stage 1
            of_test, of_stop = predict_frozen(head, rows.features.take(fold.test)), frozen
        return Continued(of_test, of_stop, len(found.history), model.n_parameters())
