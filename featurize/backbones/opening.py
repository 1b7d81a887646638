"""Choosing the backbone, the device and the precision."""

import os
from pathlib import Path
from typing import Any

from ...cache.errors import BackboneError
from .base import OFFLINE, Backbone
from .huggingface import HuggingFaceBackbone, download
from .offline import OfflineBackbone


def open_backbone(name: str, revision: str | None = None) -> Backbone:
    """Return the backbone called ``name``: ``offline``, a local folder, or a hub id.

    Raises
    ------
    BackboneError
        No such folder, the hub cannot be reached, or the offline backbone is not installed. There is no fallback.
    """
    if name == OFFLINE:
        if revision is not None:
            raise BackboneError("the offline backbone has no revisions: leave --revision out")
        return OfflineBackbone()
    folder = Path(os.path.abspath(Path(name).expanduser()))
    if name and folder.is_dir():
        return HuggingFaceBackbone(str(folder), folder, None)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise BackboneError(f"no such backbone folder: {name}: give its path with --backbone")
    if "/" not in name:
        raise BackboneError(
            f"unknown backbone {name!r}: give an existing folder, a hub id such as owner/name, or {OFFLINE}"
        )
    snapshot, revision = download(name, revision)
    return HuggingFaceBackbone(name, snapshot, revision)


def moved_to(backbone: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Return the location of a recorded ``backbone``: ``name`` if given, else as recorded."""
    return backbone if name is None else {"name": name, "revision": None}


def choose_device(device: str) -> str:
    """Resolve ``auto`` to cuda, mps or cpu; raise a BackboneError if this machine does not have the device."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available.get(device):
        choices = ", ".join(name for name, is_available in available.items() if is_available)
        raise BackboneError(f"device {device} is not available on this machine: choose auto or one of {choices}")
    return device


def choose_dtype(dtype: str, device: str) -> str:
    """Resolve ``auto`` to bfloat16 if the device computes in it natively, else to float32."""
    if dtype != "auto":
        return dtype
    import torch

    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # PyTorch has no public name for this test. Without the private one, compute in float32.
    if device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        return "bfloat16"
    return "float32"
