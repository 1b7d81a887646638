"""Candidates of an experiment: recipes with names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.store import FeatureCache
from ..model.fusions import FUSIONS, fusion_class, refuse_weights
from ..recipe import TOWERS, Recipe

FINETUNE = ":finetune"  # suffix of the name of a candidate with both stages


@dataclass(frozen=True)
class Candidate:
    """A recipe with a name for tables. A recipe with ``finetune`` is trained in both stages."""

    name: str
    recipe: Recipe


def all_fusions(cache_path: str | Path, recipe: Recipe) -> list[str]:
    """Return all fusions that cache and recipe allow, and ``linear`` if the recipe has an MLP without views."""
    with FeatureCache.open(cache_path) as cache:
        names = [name for name, fusion in FUSIONS.items() if cache.has_tokens or not fusion.needs_tokens]
    if recipe.head == "linear":
        return [name for name in names if not FUSIONS[name].has_weights]
    return names if recipe.views else [*names, "linear"]


def candidates_of(names: Sequence[str], recipe: Recipe, finetune: Mapping[str, Any] | None = None) -> list[Candidate]:
    """Return a candidate per name: a fusion, ``linear`` (the linear head on concat), or ``<fusion>:linear``.

    Any name may end in ``:finetune``, which adds stage 2 with the settings ``finetune``. Raise an MmcliError if no
    fusion has this name, or if it has weights, which a linear head cannot learn.
    """
    candidates = []
    for name in names:
        stage1 = name.removesuffix(FINETUNE)
        fusion, _, head = ("concat", ":", "linear") if stage1 == "linear" else stage1.partition(":")
        changed = recipe.changed(fusion=fusion, head=head or recipe.head)
        fusion_type = fusion_class(fusion, recipe.modality)
        if changed.head == "linear":
            refuse_weights(fusion_type, fusion)
        candidates.append(Candidate(name, changed if stage1 == name else changed.with_finetune(finetune)))
    return candidates


def modalities_of(recipe: Recipe, finetune: Mapping[str, Any] | None = None) -> list[Candidate]:
    """Return the candidates of a modality ablation: both, text, image; with ``finetune``, also each with stage 2.

    Layers of a tower that a candidate does not see stay frozen, even if ``finetune`` unfreezes them.
    """
    candidates = []
    for modality in ("both", "text", "image"):
        changed = recipe.changed(modality=modality)
        candidates.append(Candidate(modality, changed))
        if finetune is not None:
            unseen = {name for tower, name in TOWERS.items() if modality not in ("both", tower)}
            settings = {name: value for name, value in finetune.items() if name not in unseen}
            candidates.append(Candidate(modality + FINETUNE, changed.with_finetune(settings)))
    return candidates
