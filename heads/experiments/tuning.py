"""``sweep``: try settings of a head on folds of the training and validation rows, without the test rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...cache.errors import MmcliError
from ..recipe import OF_STAGE_2, Recipe, parse_setting, setting_text
from .candidates import Candidate
from .comparison import compare
from .results import Comparison
from .setup import Protocol, Setup

_BASE = "current settings"


def _is_logarithmic(name: str) -> bool:
    """Return whether a range of this setting is drawn on a logarithmic scale: rates and weight decay."""
    name = name.removeprefix(OF_STAGE_2)
    return name == "lr" or name.startswith("lr_") or name == "weight_decay"


def grid_of(settings: Sequence[str], parse: Callable[[str, str], Any] = parse_setting) -> dict[str, Any]:
    """Read ``name=a,b,c`` (values) and ``name=low:high`` (a range), each as the type of that setting.

    Return a list of values, or a (low, high) tuple, by name. ``parse`` reads a value of a setting. Raise an MmcliError
    if a setting is unknown or given twice, or cannot have a value.
    """
    grid: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not text.strip():
            raise MmcliError(f"{setting!r} names no value: write {name}=a,b,c or {name}=low:high")
        if name in grid:
            raise MmcliError(f"{name} is given twice: list its values once, {name}=a,b,c")
        low, colon, high = text.partition(":")
        if colon:
            bounds = (parse(name, low), parse(name, high))
            if not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in bounds):
                raise MmcliError(f"{name} is not a number, so it has no range: write {name}=a,b,c")
            if not bounds[0] < bounds[1] or (_is_logarithmic(name) and bounds[0] <= 0):
                raise MmcliError(f"{setting!r} is not a range: write {name}=low:high with low below high (and above 0)")
            grid[name] = bounds
        else:
            grid[name] = [parse(name, value) for value in text.split(",")]
    return grid


def settings_to_try(grid: Mapping[str, Any], trials: int | None, seed: int) -> list[dict[str, Any]]:
    """Return all combinations of ``grid``, or ``trials`` random combinations, which a range needs."""
    from scipy.stats import loguniform, randint, uniform
    from sklearn.model_selection import ParameterGrid, ParameterSampler

    if not grid:
        return []
    ranges = [name for name, values in grid.items() if isinstance(values, tuple)]
    if trials is None:
        if ranges:
            raise MmcliError(f"{ranges[0]} is a range: say with --trials how many values to draw")
        return list(ParameterGrid(dict(grid)))
    if trials < 1:
        raise MmcliError(f"trials must be 1 or more, found {trials}")
    distributions: dict[str, Any] = {}
    for name, values in grid.items():
        if not isinstance(values, tuple):
            distributions[name] = values
        elif _is_logarithmic(name):
            distributions[name] = loguniform(*values)
        elif isinstance(values[0], int):
            distributions[name] = randint(values[0], values[1] + 1)
        else:
            distributions[name] = uniform(values[0], values[1] - values[0])
    most = trials if ranges else min(trials, math.prod(len(values) for values in grid.values()))
    combinations = ParameterSampler(distributions, most, random_state=seed)
    return [{name: _plain(value) for name, value in combination.items()} for combination in combinations]


def _plain(value: Any) -> Any:
    """Convert a NumPy number to a Python number; round floats to three digits, which can be typed again."""
    value = value.item() if hasattr(value, "item") else value
    return float(f"{value:.3g}") if isinstance(value, float) else value


def sweep(
    setup: Setup,
    recipe: Recipe,
    grid: Mapping[str, Any],
    trials: int | None = None,
    protocol: Protocol | None = None,
) -> Comparison:
    """Compare ``recipe`` with changes of its settings, on folds of the training and validation rows only.

    Parameters
    ----------
    setup
        Where to read and write; the test rows of its split are left out.
    recipe
        The baseline. If it has a stage 2, the baseline is only its stage 1, and all changes are tried with both stages.
    grid
        The result of ``grid_of``. Names that begin with ``finetune.`` are settings of stage 2.
    trials
        Number of random combinations; default: all combinations.
    protocol
        How to make folds; default: one repeat.
    """
    if not grid and recipe.finetune is None:
        raise MmcliError("nothing to sweep over: name settings with --grid name=a,b,c")
    protocol = replace(protocol or Protocol(repeats=1), without_test=True)
    base = recipe.without_finetune()
    candidates, used = [Candidate(_BASE, base)], set(base.that_matter())
    tried: dict[str, dict[str, Any]] = {_BASE: {}}
    unchanged: list[dict[str, Any]] = [] if recipe.finetune is None else [{}]
    for changes in unchanged + settings_to_try(grid, trials, protocol.seed):
        changed = Candidate(describe(changes) or "finetune", recipe.changed(**changes))
        used |= set(changed.recipe.that_matter()) | {name for name in changes if name.startswith(OF_STAGE_2)}
        if changed.recipe.that_matter() not in [candidate.recipe.that_matter() for candidate in candidates]:
            tried[changed.name] = changes
            candidates.append(changed)
    for name in grid:
        if name not in used:
            raise MmcliError(f"{name} has no effect on this head ({recipe.sees}, {recipe.head}): leave it out")
    result = compare(setup, candidates, protocol, against=_BASE, what="sweep")
    best = result.candidates[0].name
    return replace(result, best=tried[best], best_goes_on=recipe.finetune is not None and best != _BASE)


def describe(changes: Mapping[str, Any]) -> str:
    """Return changed settings as they are typed: ``lr=0.001 hidden=256x64``."""
    return " ".join(f"{name}={setting_text(value)}" for name, value in changes.items())
