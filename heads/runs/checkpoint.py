"""best.pt: tensors and a JSON header, nothing that runs code when it is loaded."""

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
    """A trained head, or an ensemble of them, and what is needed to use it on other pairs.

    Attributes
    ----------
    head
        In evaluation mode.
    classes
        Names, in the order of the logits.
    sizes
        Lengths of embeddings, widths of token states.
    recipe
        How it was trained; its seed is the first of ``seeds``.
    seeds
        One for each head.
    identity, backbone
        Of the features it was trained on (see ``cache.schema.Header``).
    split
        Guids of the rows it was trained, stopped and tested on.
    best_epochs
        Whose weights these are, for each head.
    made_from
        ``{"cache", "labels"}``: absolute paths at the time of training, the defaults of later commands; and
        ``{"cache_from_run", "labels_from_run"}``: the same as seen from the run folder, for when all moved together.
    path
        The file it was read from.
    relabelled
        What became of classes of the labels file: the name that the head knows them by, or None where it does not.
    changed
        After stage 2, for each head: the weights of the unfrozen layers by their names in the whole model. Empty after
        stage 1. Nothing else of the backbone is kept.
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

    @property
    def fingerprint(self) -> str:
        """Of the features that the head was trained on."""
        return fingerprint_of(self.identity)

    def cache_path(self, given: str | Path | None = None) -> Path:
        """Return the cache to use: ``given``, or the one of the training, or the one beside a run that was moved.

        Raises
        ------
        CacheError
            Neither of the two is there; it names both.
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
                "other pairs: say with --cache where it is"
            )
        raise CacheError(
            f"no feature cache at {recorded}, where the head was trained, nor at {beside}: say with --cache where it is"
        )

    def labels_path(self, given: str | Path | None = None) -> Path:
        """Return the labels file to use, by the same order."""
        if given is not None:
            return Path(given)
        recorded, beside = self._places("labels")
        return beside if beside.is_file() and not recorded.is_file() else recorded

    def _places(self, what: str) -> tuple[Path, Path]:
        """Return where a file was at the training, and where it is if it was moved together with the run folder."""
        recorded, beside = Path(self.made_from[what]), self.made_from.get(f"{what}_from_run")
        if beside is None or self.path is None:
            return recorded, recorded
        return recorded, Path(os.path.normpath(self.path.parent / beside))

    def inputs(self, cache_path: str | Path | None = None) -> list[Path]:
        """Return the files that the head was made from: labels, split, and what its cache, if it is there, records."""
        files = [Path(self.made_from["labels"])]
        if self.path is not None:
            files += (self.path.parent / "splits").glob("*.csv")
        with contextlib.suppress(CacheError), FeatureCache.open(self.cache_path(cache_path)) as cache:
            files += [Path(place) for place in cache.header.dataset.values() if place is not None]
        return files

    def check_cache(self, cache: FeatureCache) -> None:
        """Refuse a cache of another fingerprint.

        Raises
        ------
        CheckpointError
            Naming what differs.
        """
        if cache.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"this head was trained on features of {self.backbone['name']}, those in {cache.path} are of "
                f"{cache.header.backbone['name']} or made otherwise ("
                + "; ".join(describe_difference(cache.header.identity, self.identity))
                + "): use the cache it was trained on, or train a head on this one"
            )


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``path`` atomically: a JSON header and named groups of tensors."""
    header = json.dumps(header_of(checkpoint), sort_keys=True)
    tensors = {"tensors": tensors_of(checkpoint.head), "changed": checkpoint.changed}
    write_tensor_file(path, {"format": FORMAT, "header": header, **tensors})


def header_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return, as plain data, all of a checkpoint but its tensors."""
    return {
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


def load_checkpoint(path: str | Path, device: str = "cpu") -> Checkpoint:
    """Read a best.pt, given by its name or by its run folder. No code in it is run: ``torch.load(weights_only=True)``.

    Raises
    ------
    CheckpointError
        No such file; a pickle with code in it; not a checkpoint of mmcli; cut off.
    """
    return read_best_pt(path).checkpoint(device)


@dataclass(frozen=True)
class Stored:
    """A best.pt as it was read: ``content`` has ``format``, ``header`` (JSON) and groups of tensors."""

    path: Path
    content: dict[str, Any]

    def header(self) -> dict[str, Any]:
        """Return the header; what every command takes from it has the type that it should have."""
        with self.must_fit():
            header = json.loads(self.content["header"])
            _check_header(header)
            return dict(header)

    def checkpoint(self, device: str = "cpu") -> Checkpoint:
        """Return the head that is in it."""
        header, tensors = self.header(), self.content["tensors"]
        with self.must_fit():
            recipe = Recipe.from_dict({"finetune": header.get("finetune"), **header["recipe"]})
            sizes, n_classes = Sizes(**header["sizes"]), len(header["classes"])
            if len(header["seeds"]) != len({name.split(".")[1] for name in tensors if name.startswith("heads.")}):
                raise ValueError("it has not as many heads as seeds")
            with torch.device("meta"):  # shapes alone, whatever sizes the header claims
                head = Ensemble([Head(sizes, n_classes, recipe) for _ in header["seeds"]], n_classes)
            check_tensors(tensors, head.state_dict())
            head.load_state_dict(tensors, assign=True)
            changed = self.content.get("changed", [])
            _check_changed(changed, len(header["seeds"]) if recipe.finetune is not None else 0)
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
                path=self.path,
                relabelled=header.get("relabelled", {}),
                changed=changed,
            )

    @contextlib.contextmanager
    def must_fit(self) -> Iterator[None]:
        """Turn what goes wrong while the content is taken apart into a CheckpointError."""
        try:
            yield
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError, MmcliError) as error:
            raise CheckpointError(
                f"{self.path} is a best.pt of mmcli, but its content does not fit ({first_line(error)}): was it "
                "changed by hand, or written by a newer mmcli?"
            ) from error


def read_best_pt(path: str | Path) -> Stored:
    """Read a best.pt; errors as ``load_checkpoint``."""
    path = find_best_pt(path)
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
    return Stored(path.resolve(), content)


def stage1_of(checkpoint: Checkpoint) -> Checkpoint:
    """Return the stage 1 from which a checkpoint of `mmcli finetune` started; any other checkpoint as it is.

    Raises
    ------
    CheckpointError
        Its best.pt is gone.
    """
    earlier = checkpoint.made_from.get("stage1")
    if earlier is None:
        return checkpoint
    if not Path(earlier).is_file():
        raise CheckpointError(
            f"{checkpoint.path} is of `mmcli finetune`, and the head that it went on from, {earlier}, is gone: give a "
            "best.pt of `mmcli train-head`"
        )
    return stage1_of(load_checkpoint(earlier))


def _check_changed(changed: Any, count: int) -> None:
    """Raise a ValueError where the layers are not ``count`` groups of finite tensors."""
    if not isinstance(changed, list) or len(changed) != count:
        raise ValueError(f"it does not have a group of layers for each of {count} heads")
    for name, tensor in (item for weights in changed for item in dict(weights).items()):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is no tensor")
        check_tensor(name, tensor)


def _check_header(header: Any) -> None:
    """Raise a ValueError where a part of a header is not of the type that it should have."""
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    texts = {"classes": header["classes"]} | {
        f"split.{name}": header["split"][name] for name in ("train", "val", "test")
    }
    for name, value in texts.items():
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{name} is no list of names")
    relabelled = header.get("relabelled", {})
    if not isinstance(relabelled, dict) or not all(isinstance(each, str | None) for each in relabelled.values()):
        raise ValueError("relabelled is no object of names")
    if not header["classes"] or len(set(header["classes"])) < len(header["classes"]):
        raise ValueError("classes are missing or given twice")
    for name in ("seeds", "best_epochs"):
        if not isinstance(header[name], list) or not all(type(each) is int for each in header[name]):
            raise ValueError(f"{name} is no list of whole numbers")
    if len(header["seeds"]) != len(header["best_epochs"]):
        raise ValueError("seeds and best_epochs differ in length")
    identity, backbone = header["identity"], header["backbone"]
    expected: dict[str, tuple[Any, type | tuple[type, ...]]] = {
        "backbone.name": (backbone["name"], str),
        "backbone.revision": (backbone["revision"], (str, type(None))),
        "identity.dtype": (identity["dtype"], str),
        "identity.image.resize": (identity["image"]["resize"], (int, type(None))),
        "identity.text.cleaning": (identity["text"]["cleaning"], int),
        **{f"made_from.{name}": (header["made_from"][name], str) for name in ("cache", "labels", *header["made_from"])},
        **{f"sizes.{name}": (size, int) for name, size in header["sizes"].items()},
    }
    for name, (value, kinds) in expected.items():
        if not isinstance(value, kinds):
            raise ValueError(f"{name} cannot be {str(value)[:40]!r}")
