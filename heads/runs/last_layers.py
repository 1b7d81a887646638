"""Stage 2 as an input of the head: the last layers of the backbone, and what enters them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...cache.store import FeatureCache
from ...featurize.backbones.towers import Top
from ...featurize.encode import OnProgress
from ...featurize.frozen.source import Source
from ...featurize.frozen.state_store import StateStore
from ..finetune_recipe import TOWERS, FinetuneRecipe
from ..model.head import Head
from ..model.inputs import Rows
from ..recipe import Recipe
from ..training.loop import FitOptions
from .fit_store import key_of
from .fitting import FitTask


@dataclass(frozen=True)
class LastLayers:
    """The unfrozen layers of one recipe.

    Attributes
    ----------
    recipe
        With numbers of layers in place of ``ALL``.
    tops
        The layers by tower, in float32; each head trains copies of them.
    rows
        By part: rows whose features have the states that enter these layers.
    """

    recipe: FinetuneRecipe
    tops: dict[str, Top]
    rows: dict[str, Rows]


def resolved(recipe: FinetuneRecipe, source: Source) -> FinetuneRecipe:
    """Return ``recipe`` with numbers in place of ``ALL``; a BackboneError says that a tower has fewer layers."""
    counts = source.layer_counts(recipe.layers())
    return recipe.changed(**{TOWERS[tower]: count for tower, count in counts.items()})


def last_layers(
    cache: FeatureCache,
    recipe: FinetuneRecipe,
    source: Source,
    parts: Mapping[str, Sequence[str]],
    rows: Mapping[str, Rows],
    on_states: OnProgress | None = None,
) -> LastLayers:
    """Return the unfrozen layers of ``recipe`` and what enters them, computed for all parts in one go and kept.

    Parameters
    ----------
    parts, rows
        Guids by part, and the rows of these guids.
    on_states
        Called with (pairs computed, pairs to compute); not at all where all states are there.

    Raises
    ------
    BackboneError
        The backbone is not at hand, is another one, or has fewer layers.
    DataError
        Raw pairs are gone or have changed.
    """
    recipe = resolved(recipe, source)
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
        part_states = {tower: each.take(places) for tower, each in states.items()}
        with_states[name] = replace(rows[name], features=replace(rows[name].features, states=part_states))
    return LastLayers(recipe, tops, with_states)


def stage2_tasks(
    heads: Sequence[Head],
    recipe: Recipe,
    layers: LastLayers,
    count: int,
    options: FitOptions,
    depends_on: Mapping[str, object],
    rates: Callable[[int], list[float] | None] = lambda number: None,
) -> list[FitTask]:
    """Return ``count`` fits of stage 2; number i starts from head i, and from the first again where there are fewer.

    Parameters
    ----------
    recipe
        Of stage 1; its seed is that of the first fit.
    depends_on
        Plain data: what the fits depend on beside their recipe, such as the data and the heads.
    rates
        The learning rates of fit number i in the run that is repeated.
    """
    tasks = []
    for number in range(count):
        seeded = replace(recipe.reseeded(number), finetune=layers.recipe)
        head = copy.deepcopy(heads[number % len(heads)])
        head.attach(layers.tops)
        key = key_of({**depends_on, "recipe": seeded.to_dict(), "rates": rates(number)}, [])
        train, val = layers.rows["train"], layers.rows.get("val")
        tasks.append(FitTask(seeded, head.n_classes, train, val, replace(options, rates=rates(number)), key, head))
    return tasks
