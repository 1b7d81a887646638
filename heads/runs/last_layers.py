"""Stage 2 as an input of the head: the last layers of the backbone, and the states that enter them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...cache.store import FeatureCache
from ...featurize.backbones.towers import Top
from ...featurize.encode import OnProgress
from ...featurize.source import Source
from ...featurize.state_store import StateStore
from ..model.head import Head
from ..model.inputs import Rows
from ..recipe import TOWERS, FinetuneRecipe, Recipe
from ..training.loop import FitOptions
from .fit_store import FitTask, key_of


@dataclass(frozen=True)
class LastLayers:
    """The last layers of the towers, and the states that enter them. Recipes with as many layers can share them.

    ``counts`` are the numbers of layers by tower, ``tops`` the layers themselves, in float32, and ``rows`` the rows by
    part, whose features have the states.
    """

    counts: dict[str, int]
    tops: dict[str, Top]
    rows: dict[str, Rows]

    def start(self, head: Head) -> Head:
        """Return a copy of a head of stage 1 with a copy of the layers, to be trained in stage 2."""
        head = copy.deepcopy(head)
        head.attach(self.tops)
        return head

    def resolved(self, recipe: Recipe) -> Recipe:
        """Return ``recipe`` with the numbers of layers in place of ``ALL``."""
        assert recipe.finetune is not None
        counts = {TOWERS[tower]: count for tower, count in self.counts.items()}
        return replace(recipe, finetune=recipe.finetune.changed(**counts))


def open_last_layers(
    cache: FeatureCache,
    recipe: FinetuneRecipe,
    source: Source,
    parts: Mapping[str, Sequence[str]],
    rows: Mapping[str, Rows],
    on_states: OnProgress | None = None,
) -> LastLayers:
    """Return the layers that ``recipe`` unfreezes and the states that enter them, computed for all parts and kept.

    ``parts`` and ``rows`` are the guids and the rows by part. ``on_states`` is called with (pairs computed, pairs to
    compute), unless all states are kept already. Raise a BackboneError if the backbone is not at hand, is another
    backbone, or has fewer layers; raise a DataError if raw pairs are gone or have changed.
    """
    counts = source.layer_counts(recipe.layers())
    tops = source.tops(counts)
    guids = [guid for part in parts.values() for guid in part]
    states = {
        tower: StateStore(cache, tower, count, source).states(guids, on_states) for tower, count in counts.items()
    }
    source.forget()
    with_states, start = {}, 0
    for name, part in parts.items():
        places = np.arange(start, start + len(part))
        start += len(part)
        part_states = {tower: tower_states.take(places) for tower, tower_states in states.items()}
        with_states[name] = replace(rows[name], features=replace(rows[name].features, states=part_states))
    return LastLayers(counts, tops, with_states)


def stage2_tasks(
    heads: Sequence[Head],
    recipe: Recipe,
    layers: LastLayers,
    options: FitOptions,
    depends_on: Mapping[str, object],
    schedules: Sequence[list[float] | None],
) -> list[FitTask]:
    """Return a task of stage 2 for each of ``schedules``. Task i starts from head i, modulo the number of heads.

    The recipe has both stages; its seed is the seed of the first fit. ``depends_on`` is plain data: all that the fits
    depend on beside their recipe. ``schedules`` are the learning rates of fits that are repeated, of which only the
    number of epochs counts; None for the schedule of the recipe.
    """
    tasks = []
    for number, rates in enumerate(schedules):
        seeded = layers.resolved(recipe.reseeded(number))
        head = layers.start(heads[number % len(heads)])
        key = key_of({**depends_on, "recipe": seeded.to_dict(), "rates": rates}, [])
        train, val = layers.rows["train"], layers.rows.get("val")
        tasks.append(FitTask(seeded, head.n_classes, train, val, replace(options, rates=rates), key, head))
    return tasks
