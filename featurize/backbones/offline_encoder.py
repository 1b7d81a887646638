"""The offline backbone, loaded. Importing this module imports torch."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .base import Encoded
from .tensors import Preparer, TorchEncoder, make_preparer, to_float, to_half
from .towers import Top, Tower, check_layers, cut, upper, with_children

IMAGE_SIZE = 224
# The published normalisation for the image weights.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
_NORM_OF = {
    "_conv_stem": "_bn0",
    "_conv_head": "_bn1",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
}


def orthonormal_projection(rows: int, columns: int, seed: int) -> NDArray[np.float32]:
    """Return a seeded random matrix, (rows, columns), whose rows (or columns, if fewer) are orthonormal."""
    from threadpoolctl import threadpool_limits

    gaussian = np.random.default_rng(seed).standard_normal((max(rows, columns), min(rows, columns)))
    with threadpool_limits(1):  # on a busy machine, threads would wait for each other for seconds
        q, r = np.linalg.qr(gaussian)
    q = q * np.sign(np.diag(r))  # the sign convention of QR differs between libraries
    return np.ascontiguousarray(q.T if rows < columns else q, dtype=np.float32)


class OfflineEncoder(TorchEncoder):
    """MiniLM and EfficientNet, loaded (see ``load_offline_encoder``).

    ``projections`` of text, (384, d), and image, (1280, d), are float32.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_model: nn.Module,
        image_model: nn.Module,
        prepare: Preparer,
        projections: Sequence[NDArray[np.float32]],
        *,
        device: str,
        dtype: str,
    ) -> None:
        super().__init__(tokenizer, prepare, device, dtype)
        self.text_model = self._ready(text_model)
        # Depthwise convolutions are twice as fast on a CPU with channels last.
        folded = self._ready(fold_norms(image_model.eval()))
        self.folded_image_model = folded.to(memory_format=torch.channels_last)
        self.image_model = self._ready(image_model).to(memory_format=torch.channels_last)
        self.text_projection, self.image_projection = (torch.from_numpy(each).to(device) for each in projections)

    def encode_images(self, pixels: NDArray[np.float32], tokens: bool = False) -> Encoded:
        """Encode prepared images. Tokens are the 7 x 7 positions of the last feature map, (49, 1280)."""
        with self._turn(len(pixels)), torch.inference_mode():
            features = self._feature_maps(self.folded_image_model, pixels)
            pooled, states = pool_map(features, self.image_projection)
            return Encoded(to_float(pooled), list(to_half(states)) if tokens else None)

    def encode_texts(self, ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode B token lists, padded to the longest of them. Tokens are (L, 384)."""
        with self._turn(len(ids)), torch.inference_mode():
            padded, mask = self._pad(ids)
            states = self._run_texts(padded, mask)
            pooled = pool_tokens(states, mask, self.text_projection)
            return Encoded(to_float(pooled), self._own(to_half(states), ids) if tokens else None)

    def _feature_maps(self, model: Any, pixels: NDArray[np.float32]) -> Tensor:
        with self._computing():
            batch = torch.from_numpy(pixels).to(self.device).contiguous(memory_format=torch.channels_last)
            features: Tensor = model.extract_features(batch)
            return features

    def _run_images(self, pixels: NDArray[np.float32]) -> Tensor:
        return self._feature_maps(self.image_model, pixels)

    def _run_texts(self, padded: Tensor, mask: Tensor) -> Tensor:
        with self._computing():
            states: Tensor = self.text_model(input_ids=padded, attention_mask=mask).last_hidden_state
            return states

    def text_layers(self) -> list[nn.Module]:
        """Return MiniLM's six layers."""
        return list(self.text_model.encoder.layer)

    def vision_layers(self) -> list[nn.Module]:
        """Return EfficientNet's 16 blocks and the convolution after them."""
        return [*self.image_model._blocks, self.image_model._conv_head]

    def image_top(self, layers: int) -> Top:
        """Return the last layers of EfficientNet and its last norm."""
        check_layers(self.vision_layers(), layers, "image")
        return _EfficientNetTop(self.image_model, layers, self.image_projection)

    def text_top(self, layers: int) -> Top:
        """Return the last layers of MiniLM; its norms are inside the layers."""
        check_layers(self.text_layers(), layers, "text")
        return _MiniLMTop(self.text_model, layers, self.text_projection, self.tokenizer.pad_token_id)


def load_offline_encoder(
    text_folder: Path,
    image_weights: Path,
    projections: Sequence[NDArray[np.float32]],
    device: str,
    dtype: str,
    resize: int | None,
) -> OfflineEncoder:
    """Load both encoders; ``projections`` are those of text and image (see ``OfflineEncoder``)."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    safe = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(text_folder, **safe)
    text_model = transformers.AutoModel.from_pretrained(text_folder, dtype="float32", **safe)
    image_model = EfficientNet.from_name("efficientnet-lite0")
    image_model.load_state_dict(torch.load(image_weights, map_location="cpu", weights_only=True))
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    prepare = make_preparer(processor, resize)
    return OfflineEncoder(tokenizer, text_model, image_model, prepare, projections, device=device, dtype=dtype)


def fold_norms(model: nn.Module) -> nn.Module:
    """Return a copy of an EfficientNet whose norms and paddings are merged into its convolutions.

    A norm with fixed statistics is a scale and a shift per channel, which the convolution before it can do.
    """
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, nn.ReLU6):
            module.inplace = True
        for name, norm in _NORM_OF.items():
            if hasattr(module, name):
                folded: Any = fuse_conv_bn_eval(getattr(module, name), getattr(module, norm))
                left, right, top, bottom = getattr(folded.static_padding, "padding", (0, 0, 0, 0))
                if left == right == top == bottom:
                    folded.padding, folded.static_padding = (top, left), nn.Identity()
                setattr(module, name, folded)
                setattr(module, norm, nn.Identity())
    return model


def pool_tokens(states: Tensor, mask: Tensor, projection: Tensor) -> Tensor:
    """Return the projected mean over each text's tokens, (B, d), given last hidden states, (B, L, w)."""
    weight = mask.unsqueeze(2).to(projection.dtype)
    return (states.to(projection.dtype) * weight).sum(dim=1) / weight.sum(dim=1) @ projection


def pool_map(features: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Return the projected mean over positions, (B, d), and all positions, (B, P, w), of feature maps, (B, w, H, W)."""
    states = features.to(projection.dtype).flatten(2).transpose(1, 2)
    return states.mean(dim=1) @ projection, states


class _MiniLMTop(Top):
    projection: Tensor

    def __init__(self, model: nn.Module, layers: int, projection: Tensor, pad_id: int) -> None:
        tower, unfrozen = cut(model, Tower("text_model", "layer"), layers)
        tower = with_children(tower, pooler=None)  # BERT's own pooler is not used
        super().__init__(nn.ModuleDict({"text_model": tower}), unfrozen, pad_id)
        self.register_buffer("projection", projection)

    def forward(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert mask is not None
        model: Any = self.tower["text_model"]  # type: ignore[index]
        out = self.run_from(states, lambda: model(input_ids=ids, attention_mask=mask)).last_hidden_state
        return pool_tokens(out, mask, self.projection), out


class _EfficientNetTop(Top):
    projection: Tensor

    def __init__(self, model: Any, layers: int, projection: Tensor) -> None:
        blocks = upper(model._blocks, layers - 1)
        tower = with_children(model, _blocks=blocks, _conv_stem=None, _bn0=None, _fc=None)
        super().__init__(nn.ModuleDict({"image_model": tower}), [blocks, model._conv_head, model._bn1])
        self.register_buffer("projection", projection)

    def forward(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        model: Any = self.tower["image_model"]  # type: ignore[index]
        # As in EfficientNet.extract_features.
        for block in model._blocks:
            states = block(states)
        return pool_map(model._swish(model._bn1(model._conv_head(states))), self.projection)
