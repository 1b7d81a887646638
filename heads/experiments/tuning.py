"""``sweep``: settings of a head tried on validation folds; the test rows are never looked at."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...cache.errors import MmcliError
from ..recipe import OF_STAGE_2, Recipe, parse_setting
from ..settings import setting_text
from .candidates import Candidate
from .comparison import compare
from .setup import Protocol, Setup

_BASE = "as it is"


def _is_logarithmic(name: str) -> bool:
    """Whether a range of a setting is drawn on a logarithmic scale: rates and weight decay."""
    name = name.removeprefix(OF_STAGE_2)
    return name == "lr" or name.startswith("lr_") or name == "weight_decay"


def grid_of(settings: Sequence[str], parse: Callable[[str, str], Any] = parse_setting) -> dict[str, Any]:
    """Read ``name=a,b,c`` (values) and ``name=low:high`` (a range), each as the type of that setting.

    Parameters
    ----------
    settings
        As they are typed.
    parse
        Reads one value of a setting; an MmcliError says that there is no such setting, or what it must be.

    Returns
    -------
    dict
        A list of values, or a (low, high) tuple, by name.

    Raises
    ------
    MmcliError
        No such setting, a value that it cannot have, a name given twice.
    """
    found: dict[str, Any] = {}
    for each in settings:
        name, equals, text = each.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not text.strip():
            raise MmcliError(f"{each!r} names no value: write {name}=a,b,c or {name}=low:high")
        if name in found:
            raise MmcliError(f"{name} is given twice: list its values once, {name}=a,b,c")
        low, colon, high = text.partition(":")
        if colon:
            bounds = (parse(name, low), parse(name, high))
            if not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in bounds):
                raise MmcliError(f"{name} is not a number, so it has no range: write {name}=a,b,c")
            if not bounds[0] < bounds[1] or (_is_logarithmic(name) and bounds[0] <= 0):
                raise MmcliError(f"{each!r} is not a range: write {name}=low:high with low below high (and above 0)")
            found[name] = bounds
        else:
            found[name] = [parse(name, value) for value in text.split(",")]
    return found


def settings_to_try(grid: Mapping[str, Any], trials: int | None, seed: int) -> list[dict[str, Any]]:
    """Return every combination of ``grid``, or with ``trials`` that many random ones.

    Raises
    ------
    MmcliError
        A range, without ``trials``.
    """
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
    drawn: dict[str, Any] = {}
    for name, values in grid.items():
        if not isinstance(values, tuple):
            drawn[name] = values
        elif _is_logarithmic(name):
            drawn[name] = loguniform(*values)
        elif isinstance(values[0], int):
            drawn[name] = randint(values[0], values[1] + 1)
        else:
            drawn[name] = uniform(values[0], values[1] - values[0])
    most = trials if ranges else min(trials, math.prod(len(values) for values in grid.values()))
    tried = list(ParameterSampler(drawn, most, random_state=seed))
    return [{name: _plain(value) for name, value in each.items()} for each in tried]


def _plain(value: Any) -> Any:
    """Turn a NumPy number into Python's, rates rounded to three digits that can be typed again."""
    value = value.item() if hasattr(value, "item") else value
    return float(f"{value:.3g}") if isinstance(value, float) else value


def sweep(
    setup: Setup,
    recipe: Recipe,
    grid: Mapping[str, Any],
    trials: int | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Compare ``recipe`` with changes of its settings, on folds of the training and validation rows only.

    Parameters
    ----------
    setup
        The test rows of its split are left out.
    recipe
        Where it has a stage 2, every change is tried with both stages, and the baseline is its stage 1 alone.
    grid
        What ``grid_of`` returns. Names that begin with ``finetune.`` are settings of stage 2.
    trials
        Draw that many random combinations; default: all of them.
    protocol
        Folds, one repeat by default.

    Returns
    -------
    dict
        As ``compare`` returns, differences taken from the baseline; also ``best`` (settings of the best candidate) and
        ``best_goes_on`` (whether it has a stage 2).
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
        if all(changed.recipe.that_matter() != other.recipe.that_matter() for other in candidates):
            tried[changed.name] = changes
            candidates.append(changed)
    for name in grid:
        if name not in used:
            raise MmcliError(f"{name} has no effect on this head ({recipe.sees}, {recipe.head}): leave it out")
    result = compare(setup, candidates, protocol, against=_BASE, what="sweep")
    best = result["candidates"][0]["name"]
    return result | {"best": tried[best], "best_goes_on": recipe.finetune is not None and best != _BASE}


def describe(changes: Mapping[str, Any]) -> str:
    """Return changed settings as they are typed: ``lr=0.001 hidden=256x64``."""
    return " ".join(f"{name}={setting_text(value)}" for name, value in changes.items())
