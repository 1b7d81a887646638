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
    """The unfrozen layers of one recipe.

    Attributes
    ----------
    recipe
        The recipe of stage 2, with numbers of layers in place of ``ALL``.
    tops
        The layers by tower, in float32; each head trains its own copy.
    rows
        Rows by part; their features have the states that enter these layers.
    """

    recipe: FinetuneRecipe
    tops: dict[str, Top]
    rows: dict[str, Rows]


def last_layers(
    cache: FeatureCache,
    recipe: FinetuneRecipe,
    source: Source,
    parts: Mapping[str, Sequence[str]],
    rows: Mapping[str, Rows],
    on_states: OnProgress | None = None,
) -> LastLayers:
    """Return the unfrozen layers of ``recipe`` and the states that enter them, computed for all parts and kept.

    ``parts`` and ``rows`` are the guids and the rows by part. ``on_states`` is called with (pairs computed, pairs to
    compute), unless all states are kept already. Raise a BackboneError if the backbone is not at hand, is another
    backbone, or has fewer layers; raise a DataError if raw pairs are gone or have changed.
    """
    counts = source.layer_counts(recipe.layers())
    recipe = recipe.changed(**{TOWERS[tower]: count for tower, count in counts.items()})
    layers = recipe.layers()
    tops = source.tops(layers)
    guids = [guid for part in parts.values() for guid in part]
    states = {
        tower: StateStore(cache, tower, count, source).states(guids, on_states) for tower, count in layers.items()
    }
    source.forget()
    with_states, start = {}, 0
    for name, part in parts.items():
        places = np.arange(start, start + len(part))
        start += len(part)
        part_states = {tower: tower_states.take(places) for tower, tower_states in states.items()}
        with_states[name] = replace(rows[name], features=replace(rows[name].features, states=part_states))
    return LastLayers(recipe, tops, with_states)


def stage2_tasks(
    heads: Sequence[Head],
    recipe: Recipe,
    layers: LastLayers,
    options: FitOptions,
    depends_on: Mapping[str, object],
    schedules: Sequence[list[float] | None],
) -> list[FitTask]:
    """Return a task of stage 2 for each of ``schedules``. Task i starts from head i, modulo the number of heads.

    The recipe is that of stage 1; its seed is the seed of the first fit. ``depends_on`` is plain data: all that the
    fits depend on beside their recipe. ``schedules`` are the learning rates of fits that are repeated; None for the
    schedule of the recipe.
    """
    tasks = []
    for number, rates in enumerate(schedules):
        seeded = replace(recipe.reseeded(number), finetune=layers.recipe)
        head = copy.deepcopy(heads[number % len(heads)])
        head.attach(layers.tops)
        key = key_of({**depends_on, "recipe": seeded.to_dict(), "rates": rates}, [])
        train, val = layers.rows["train"], layers.rows.get("val")
        tasks.append(FitTask(seeded, head.n_classes, train, val, replace(options, rates=rates), key, head))
    return tasks
