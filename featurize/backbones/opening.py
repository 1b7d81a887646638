"""Which backbone, on which device, in which precision."""

import os
from pathlib import Path
from typing import Any

from ...cache.errors import BackboneError
from .base import OFFLINE, Backbone
from .huggingface import HuggingFaceBackbone, download
from .offline import OfflineBackbone


def open_backbone(name: str, revision: str | None = None) -> Backbone:
    """Return the backbone that ``name`` means: ``offline``, a local folder, or a hub id.

    Raises
    ------
    BackboneError
        No such folder, hub not reachable, extra not installed. There is no fallback from one to another.
    """
    if name == OFFLINE:
        if revision is not None:
            raise BackboneError("the offline backbone has no revisions: leave --revision out")
        return OfflineBackbone()
    folder = Path(os.path.abspath(Path(name).expanduser()))
    if name and folder.is_dir():
        return HuggingFaceBackbone(str(folder), folder, None)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise BackboneError(f"no such backbone folder: {name}; say with --backbone where it is")
    if "/" not in name:
        raise BackboneError(
            f"unknown backbone {name!r}: give a folder that is there, a hub id such as owner/name, or {OFFLINE}"
        )
    snapshot, revision = download(name, revision)
    return HuggingFaceBackbone(name, snapshot, revision)


def moved_to(backbone: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Return where a recorded ``backbone`` is: under ``name`` now, or where it was."""
    return backbone if name is None else {"name": name, "revision": None}


def choose_device(device: str) -> str:
    """Resolve ``auto`` to cuda, mps or cpu; refuse what this machine does not have."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available.get(device):
        have = ", ".join(name for name, there in available.items() if there)
        raise BackboneError(f"device {device} is not available here: choose auto or one of {have}")
    return device


def choose_dtype(dtype: str, device: str) -> str:
    """Resolve ``auto``: bfloat16 where the processor computes in it natively, float32 elsewhere."""
    if dtype != "auto":
        return dtype
    import torch

    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # A private name, so a PyTorch without it computes in float32.
    if device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        return "bfloat16"
    return "float32"
