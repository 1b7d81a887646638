"""best.pt: tensors and a JSON header, nothing that runs code when it is loaded."""

import io
import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cache.atomic import write_bytes
from ..cache.errors import CheckpointError, MmcliError
from ..cache.schema import describe_difference, fingerprint_of
from ..cache.store import FeatureCache
from .fusions import Sizes
from .model import Ensemble, Head
from .recipe import Recipe
from .splits import Split

FORMAT = "mmcli head 2"


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
        ``{"cache", "labels"}``: absolute paths at the time of training, the defaults of later commands.
    path
        The file it was read from.
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

    @property
    def fingerprint(self) -> str:
        """Of the features that the head was trained on."""
        return fingerprint_of(self.identity)

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
    """Write ``path`` atomically."""
    header = {
        "classes": checkpoint.classes,
        "sizes": checkpoint.sizes._asdict(),
        "recipe": checkpoint.recipe.to_dict(),
        "seeds": checkpoint.seeds,
        "identity": checkpoint.identity,
        "backbone": checkpoint.backbone,
        "fingerprint": checkpoint.fingerprint,
        "split": checkpoint.split.named(),
        "best_epochs": checkpoint.best_epochs,
        "made_from": checkpoint.made_from,
        "versions": {"torch": torch.__version__},
    }
    tensors = {name: tensor.detach().cpu() for name, tensor in checkpoint.head.state_dict().items()}
    buffer = io.BytesIO()  # torch's own writing says RuntimeError where the disk is full
    torch.save({"format": FORMAT, "header": json.dumps(header, sort_keys=True), "tensors": tensors}, buffer)
    write_bytes(path, buffer.getvalue())


def load_checkpoint(path: str | Path, device: str = "cpu") -> Checkpoint:
    """Read a best.pt, given by its name or by its run folder. No code in it is run: ``torch.load(weights_only=True)``.

    Raises
    ------
    CheckpointError
        No such file; a pickle with code in it; not a checkpoint of mmcli; cut off.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.pt"
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}; train a head with `mmcli train-head`")
    if not zipfile.is_zipfile(path):  # what torch.save writes; a bare pickle is not even opened
        raise CheckpointError(f"{path} is not a best.pt of mmcli, or is cut off: train one with `mmcli train-head`")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects, which could run code when loaded: it was not loaded; use a best.pt that "
            "mmcli wrote"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read, it may be cut off ({_first_line(error)})") from error
    if isinstance(content, dict) and content.get("format") == "mmcli head 1":
        raise CheckpointError(f"{path} was written by an older mmcli: train the head again with `mmcli train-head`")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a best.pt of mmcli: train one with `mmcli train-head`")
    try:
        header = json.loads(content["header"])
        recipe = Recipe.from_dict(header["recipe"])
        sizes, n_classes = Sizes(**header["sizes"]), len(header["classes"])
        head = Ensemble([Head(sizes, n_classes, recipe) for _ in header["seeds"]], n_classes)
        head.load_state_dict(content["tensors"])
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
            path=path.resolve(),
        )
    except (KeyError, TypeError, ValueError, RuntimeError, MmcliError) as error:
        raise CheckpointError(
            f"{path} is a best.pt of mmcli, but its content does not fit ({_first_line(error)}): was it changed by "
            "hand, or written by a newer mmcli?"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
