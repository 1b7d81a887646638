"""best.pt: a trained head with all that is needed to use it on other pairs.

The file holds tensors and a JSON header; loading it runs no code.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache.errors import CacheError, CheckpointError, MmcliError
from ...cache.schema import describe_difference, fingerprint_of
from ...cache.store import FeatureCache
from ..evaluation.splits import Split
from ..model.fusions import Sizes
from ..model.head import Ensemble, Head, tensors_of
from ..recipe import Recipe
from .folders import find_best_pt
from .tensor_file import (
    CodeInsideError,
    TensorFileError,
    check_tensor,
    check_tensors,
    first_line,
    read_tensor_file,
    write_tensor_file,
)

FORMAT = "mmcli head 3"
_EARLIER = ("mmcli head 2", "mmcli finetune 1")  # the same content under other names


@dataclass
class Checkpoint:
    """A trained head or an ensemble, with all that is needed to use it on other pairs.

    Attributes
    ----------
    head
        The heads, in evaluation mode.
    classes
        Names, in the order of the logits.
    sizes
        Lengths of embeddings, widths of token states.
    recipe
        The settings of the training; the seed is the first of ``seeds``.
    seeds
        A seed for each head.
    identity, backbone
        Description of the features that the head was trained on (see ``cache.schema.Header``).
    split
        Guids of the rows for training, stopping and testing.
    best_epochs
        The epoch from which each head has its weights.
    made_from
        ``cache`` and ``labels`` are absolute paths at the time of training, the defaults of later commands.
        ``cache_from_run`` and ``labels_from_run`` are the same paths seen from the run folder, in case all files moved
        together. After stage 2, ``stage1`` is the best.pt that it started from.
    path
        The file that was read.
    relabelled
        New names for classes of the labels file; None for a class that the head does not know.
    changed
        After stage 2, for each head, the weights of the unfrozen layers by their names in the whole model. Empty after
        stage 1. The rest of the backbone is not kept.
    """

    head: Ensemble
    classes: list[str]
    sizes: Sizes
    recipe: Recipe
    seeds: list[int]
    identity: dict[str, Any]
    backbone: dict[str, Any]
    split: Split
    best_epochs: list[int]
    made_from: dict[str, str]
    path: Path | None = None
    relabelled: dict[str, str | None] = field(default_factory=dict)
    changed: list[dict[str, Tensor]] = field(default_factory=list)

    def offset_by_class(self) -> dict[str, float]:
        """Return the decision offset of each class."""
        return dict(zip(self.classes, self.head.offsets.tolist(), strict=True))

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the features that the head was trained on."""
        return fingerprint_of(self.identity)

    def cache_path(self, given: str | Path | None = None) -> Path:
        """Return the cache to use: ``given``, or the cache of the training, or the cache that moved with the run.

        Raise a CacheError if neither is there.
        """
        if given is not None:
            return Path(given)
        recorded, beside = self._places("cache")
        if recorded.is_file() or beside == recorded:
            return recorded
        if beside.is_file():
            with FeatureCache.open(beside) as cache:
                guids = [guid for part in self.split.named().values() for guid in part]
                if cache.fingerprint == self.fingerprint and 2 * sum(guid in cache for guid in guids) >= len(guids):
                    return beside
            raise CacheError(
                f"no feature cache at {recorded}, where the head was trained, and {beside} holds other features or "
                "other pairs: give the cache with --cache"
            )
        raise CacheError(
            f"no feature cache at {recorded}, where the head was trained, nor at {beside}: give the cache with --cache"
        )

    def labels_path(self, given: str | Path | None = None) -> Path:
        """Return the labels file to use, in the order of ``cache_path``."""
        if given is not None:
            return Path(given)
        recorded, beside = self._places("labels")
        return beside if beside.is_file() and not recorded.is_file() else recorded

    def _places(self, what: str) -> tuple[Path, Path]:
        """Return the path of a file at the time of training, and its path if it moved with the run folder."""
        recorded, beside = Path(self.made_from[what]), self.made_from.get(f"{what}_from_run")
        if beside is None or self.path is None:
            return recorded, recorded
        return recorded, Path(os.path.normpath(self.path.parent / beside))

    def inputs(self, cache_path: str | Path | None = None) -> list[Path]:
        """Return the files that the head was made from: labels, split, and the dataset of its cache if there is one."""
        files = [Path(self.made_from["labels"])]
        if self.path is not None:
            files += (self.path.parent / "splits").glob("*.csv")
        with contextlib.suppress(CacheError), FeatureCache.open(self.cache_path(cache_path)) as cache:
            recorded = cache.header.dataset
            files += [Path(recorded[name]) for name in ("data", "labels") if recorded[name] is not None]
        return files

    def check_cache(self, cache: FeatureCache) -> None:
        """Raise a CheckpointError that names the differences if ``cache`` has another fingerprint."""
        if cache.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"this head was trained on features of {self.backbone['name']}, and {cache.path} holds features of "
                f"{cache.header.backbone['name']}, which differ ("
                + "; ".join(describe_difference(cache.header.identity, self.identity))
                + "): use the cache that the head was trained on, or train a head on this cache"
            )


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``path`` atomically: a JSON header and named groups of tensors."""
    header = {
        "classes": checkpoint.classes,
        "sizes": checkpoint.sizes._asdict(),
        "recipe": checkpoint.recipe.to_dict(),
        "seeds": checkpoint.seeds,
        "identity": checkpoint.identity,
        "backbone": checkpoint.backbone,
        "fingerprint": checkpoint.fingerprint,
        "split": checkpoint.split.to_dict(),
        **({"relabelled": checkpoint.relabelled} if checkpoint.relabelled else {}),
        "best_epochs": checkpoint.best_epochs,
        "made_from": checkpoint.made_from,
        "versions": {"torch": torch.__version__},
    }
    content = {
        "format": FORMAT,
        "header": json.dumps(header, sort_keys=True),
        "tensors": tensors_of(checkpoint.head),
        "changed": checkpoint.changed,
    }
    write_tensor_file(path, content)


def load_checkpoint(path: str | Path, device: str = "cpu") -> Checkpoint:
    """Read a best.pt, given by its name or by its run folder, with ``torch.load(weights_only=True)``.

    Raise a CheckpointError if the file is missing, holds a pickle with code, is no checkpoint of mmcli, or is cut off.
    """
    path = find_best_pt(path)
    content, path = _read_content(path), path.resolve()
    with _content_must_fit(path):
        header, tensors = json.loads(content["header"]), content["tensors"]
        _check_header(header)
        recipe = Recipe.from_dict({"finetune": header.get("finetune"), **header["recipe"]})
        sizes, n_classes, n_heads = Sizes(**header["sizes"]), len(header["classes"]), len(header["seeds"])
        if n_heads != len({name.split(".")[1] for name in tensors if name.startswith("heads.")}):
            raise ValueError("the numbers of heads and of seeds differ")
        with torch.device("meta"):  # takes no memory, whatever sizes the header claims
            head = Ensemble([Head(sizes, n_classes, recipe) for _ in range(n_heads)], n_classes)
        check_tensors(tensors, head.state_dict())
        head.load_state_dict(tensors, assign=True)
        changed = content.get("changed", [])
        _check_changed(changed, 0 if recipe.finetune is None else n_heads)
        return Checkpoint(
            head=head.eval().to(device),
            classes=header["classes"],
            sizes=sizes,
            recipe=recipe,
            seeds=header["seeds"],
            identity=header["identity"],
            backbone=header["backbone"],
            split=Split(**header["split"]),
            best_epochs=header["best_epochs"],
            made_from=header["made_from"],
            path=path,
            relabelled=header.get("relabelled", {}),
            changed=changed,
        )


def stage1_of(checkpoint: Checkpoint) -> Checkpoint:
    """Return the stage 1 from which a stage 2 started, and any other checkpoint unchanged.

    Raise a CheckpointError if the best.pt of stage 1 is gone.
    """
    earlier = checkpoint.made_from.get("stage1")
    if earlier is None:
        return checkpoint
    if not Path(earlier).is_file():
        raise CheckpointError(
            f"{checkpoint.path} was written by `mmcli finetune`, and the head that it started from, {earlier}, is "
            "gone: give a best.pt of `mmcli train-head`"
        )
    return stage1_of(load_checkpoint(earlier))


def _read_content(path: Path) -> dict[str, Any]:
    """Return ``format``, ``header`` (JSON) and groups of tensors."""
    try:
        content = read_tensor_file(path)
    except CodeInsideError as error:
        raise CheckpointError(f"{path} is not loaded: {error}; use a best.pt that mmcli wrote") from error
    except TensorFileError as error:
        raise CheckpointError(
            f"{path} is not a best.pt of mmcli, or is damaged ({error}): restore a copy, or train one with "
            "`mmcli train-head`"
        ) from error
    if isinstance(content, dict) and content.get("format") == "mmcli head 1":
        raise CheckpointError(f"{path} was written by an older mmcli: train the head again with `mmcli train-head`")
    if not isinstance(content, dict) or content.get("format") not in (FORMAT, *_EARLIER):
        raise CheckpointError(f"{path} is not a best.pt of mmcli: train one with `mmcli train-head`")
    return content


@contextlib.contextmanager
def _content_must_fit(path: Path) -> Iterator[None]:
    """Turn any error in the content of a best.pt into a CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError, MmcliError) as error:
        raise CheckpointError(
            f"{path} is a best.pt of mmcli, but its content does not fit ({first_line(error)}): was it changed by "
            "hand, or written by a newer mmcli?"
        ) from error


def _check_changed(changed: Any, count: int) -> None:
    """Raise a ValueError unless ``changed`` is ``count`` groups of finite tensors."""
    if not isinstance(changed, list) or len(changed) != count:
        raise ValueError(f"there is not one group of layers for each of {count} heads")
    for name, tensor in (item for weights in changed for item in dict(weights).items()):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is no tensor")
        check_tensor(name, tensor)


def _check_header(header: Any) -> None:
    """Raise a ValueError where a part of the header does not have its type."""
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    names = {"classes": header["classes"]} | {
        f"split.{part}": header["split"][part] for part in ("train", "val", "test")
    }
    for key, values in names.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{key} is no list of names")
    relabelled = header.get("relabelled", {})
    if not isinstance(relabelled, dict) or not all(isinstance(name, str | None) for name in relabelled.values()):
        raise ValueError("relabelled is no object of names")
    if not header["classes"] or len(set(header["classes"])) < len(header["classes"]):
        raise ValueError("classes are missing or given twice")
    for key in ("seeds", "best_epochs"):
        if not isinstance(header[key], list) or not all(type(number) is int for number in header[key]):
            raise ValueError(f"{key} is no list of whole numbers")
    if len(header["seeds"]) != len(header["best_epochs"]):
        raise ValueError("seeds and best_epochs differ in length")
    identity, backbone = header["identity"], header["backbone"]
    expected: dict[str, tuple[Any, type | tuple[type, ...]]] = {
        "backbone.name": (backbone["name"], str),
        "backbone.revision": (backbone["revision"], (str, type(None))),
        "identity.dtype": (identity["dtype"], str),
        "identity.image.resize": (identity["image"]["resize"], (int, type(None))),
        "identity.text.cleaning": (identity["text"]["cleaning"], int),
        **{f"made_from.{key}": (header["made_from"][key], str) for key in ("cache", "labels", *header["made_from"])},
        **{f"sizes.{key}": (size, int) for key, size in header["sizes"].items()},
    }
    for key, (value, kinds) in expected.items():
        if not isinstance(value, kinds):
            raise ValueError(f"{key} cannot be {str(value)[:40]!r}")
