"""A loaded Hugging Face dual encoder. Importing this module imports torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor, nn

from .architectures import architecture_of
from .base import MAX_TOKENS, Encoded
from .one_position import at_position
from .tensors import TorchEncoder, computing, in_turn, pad, ready, to_device, to_float, to_half, tokenize
from .towers import Top, check_layers, cut, entering, freeze_unused, layers_of, without_other_tower


class HuggingFaceEncoder(TorchEncoder):
    """A loaded dual encoder. ``prepare`` converts an RGB image to pixels, (3, H, W) float32."""

    def __init__(self, model: Any, prepare: Any, tokenizer: Any, device: str, dtype: str) -> None:
        super().__init__(device, dtype)
        self.model = ready(model, device, dtype)
        self.tokenizer = tokenizer
        self.prepare = prepare
        self.max_tokens = min(MAX_TOKENS, getattr(model.config.text_config, "max_position_embeddings", MAX_TOKENS))
        self.architecture = architecture_of(model)

    def prepare_image(self, image: Image) -> NDArray[np.float32]:
        """Prepare one RGB image exactly as the model's own processor does."""
        return self.prepare(image)

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Tokenize with the model's own tokenizer."""
        return tokenize(self.tokenizer, texts, self.max_tokens)

    @in_turn
    def encode_images(self, pixels: NDArray[np.float32], tokens: bool = False) -> Encoded:
        """Encode prepared images, (B, 3, H, W) float32."""
        if not tokens and self.architecture.image.pools_one_position:
            states = entering(self.vision_layers()[-1], lambda: self._run_images(pixels))
            with computing(self.device, self.dtype):
                return Encoded(to_float(image_at_first(self.model, states)))
        pooled, states = embeddings_and_states(self.model, self._run_images(pixels))
        return Encoded(to_float(pooled), list(to_half(states)) if tokens else None)

    @in_turn
    def encode_texts(self, ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode B token lists, padded to the longest of them (SigLIP: to the full length)."""
        if not tokens and self.architecture.text.pools_one_position:
            padded, mask = self._pad(ids)
            states = entering(self.text_layers()[-1], lambda: self._run_texts(padded, mask))
            with computing(self.device, self.dtype):
                return Encoded(to_float(text_at_end(self.model, states, padded)))
        pooled, states = embeddings_and_states(self.model, self._run_texts(*self._pad(ids)))
        return Encoded(to_float(pooled), self._own(to_half(states), ids) if tokens else None)

    @in_turn
    def images_below(self, pixels: NDArray[np.float32], layers: int) -> NDArray[np.float32]:
        """Return the states that enter the last ``layers`` layers for prepared images, (B, P, w)."""
        return to_float(entering(self.vision_layers()[-layers], lambda: self._run_images(pixels)))

    @in_turn
    def texts_below(self, ids: Sequence[Sequence[int]], layers: int) -> list[NDArray[np.float32]]:
        """Return the states that enter the last ``layers`` layers for B token lists, (L, w) each.

        SigLIP: L is the full length.
        """
        padded = self._pad(ids)
        return self._own(to_float(entering(self.text_layers()[-layers], lambda: self._run_texts(*padded))), ids)

    def _run_images(self, pixels: NDArray[np.float32]) -> Any:
        with computing(self.device, self.dtype):
            return self.model.get_image_features(pixel_values=to_device(pixels, self.device))

    def _run_texts(self, padded: Tensor, mask: Tensor) -> Any:
        with computing(self.device, self.dtype):
            return text_features(self.model, padded, None if self.architecture.pads_texts else mask)

    def _pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        full = self.max_tokens if self.architecture.pads_texts else None
        return pad(ids, self.tokenizer.pad_token_id, self.device, full)

    def _own(self, states: NDArray[Any], ids: Sequence[Sequence[int]]) -> list[NDArray[Any]]:
        """Return the states of each text without its padding (SigLIP: with padding, because it attends to it)."""
        if self.architecture.pads_texts:
            return list(states)
        return [state[: len(row)] for state, row in zip(states, ids, strict=True)]

    def text_layers(self) -> list[nn.Module]:
        """Return the transformer layers of the text tower."""
        return layers_of(self.model, "text")

    def vision_layers(self) -> list[nn.Module]:
        """Return the transformer layers of the image tower."""
        return layers_of(self.model, "image")

    def image_top(self, layers: int) -> Top:
        """Return the last layers of the image tower, its last norm, and the projection."""
        check_layers(self.vision_layers(), layers, "image")
        size = self.model.config.vision_config.image_size
        pixels = np.zeros((1, 3, *(size if isinstance(size, list | tuple) else (size, size))), np.float32)
        top = _ImageTop(self.model, "image", layers)
        return freeze_unused(top, self.images_below(pixels, layers), self.encode_images(pixels).pooled)

    def text_top(self, layers: int) -> Top:
        """Return the last layers of the text tower, its last norm, and the projection."""
        check_layers(self.text_layers(), layers, "text")
        top = _TextTop(self.model, "text", layers, self.tokenizer.pad_token_id)
        ids = [[0, 1, 2]]
        return freeze_unused(
            top, np.stack(self.texts_below(ids, layers)), self.encode_texts(ids).pooled, *self._pad(ids)
        )


def embeddings_and_states(model: Any, out: Any) -> tuple[Tensor, Tensor]:
    """Return the embeddings, (B, d), and last hidden states, (B, P, w), from the output of a tower of ``model``."""
    pooled = out.pooler_output[:, 0] if architecture_of(model).projects_each_position else out.pooler_output
    states = out.last_hidden_state
    return pooled, states.flatten(2).transpose(1, 2) if states.ndim == 4 else states  # 4: ALIGN's feature maps


def text_features(model: Any, ids: Tensor, mask: Tensor | None) -> Any:
    """Return the model's output for token ids, (B, L). Without a mask it attends to every position."""
    return model.get_text_features(input_ids=ids, **({} if mask is None else {"attention_mask": mask}))


def image_at_first(model: Any, entered: Tensor) -> Tensor:
    """Return the image embeddings, (B, d), given the input of the last layer, (B, P, w). CLIP pools position 0."""
    first = torch.zeros(len(entered), dtype=torch.int64, device=entered.device)
    state = at_position(layers_of(model, "image")[-1], entered, first, None)
    embeddings: Tensor = model.visual_projection(model.vision_model.post_layernorm(state))
    return embeddings


def text_at_end(model: Any, entered: Tensor, ids: Tensor) -> Tensor:
    """Return the text embeddings, (B, d), given the input of the last layer, (B, L, w), and token ids, (B, L)."""
    # As in CLIPTextModel.forward: if an old configuration calls the end token 2, take the highest id.
    end = model.text_model.eos_token_id
    position = ids.argmax(dim=1) if end == 2 else (ids == end).int().argmax(dim=1)
    attended = torch.arange(ids.shape[1], device=ids.device) <= position[:, None]
    state = at_position(layers_of(model, "text")[-1], entered, position, attended)
    embeddings: Tensor = model.text_projection(model.text_model.final_layer_norm(state))
    return embeddings


class _HuggingFaceTop(Top):
    def __init__(self, model: Any, side: str, layers: int, pad_id: int = 0) -> None:
        tower = architecture_of(model).tower(side)
        cut_tower, unfrozen = cut(getattr(model, tower.module), tower, layers)
        super().__init__(without_other_tower(model, side, cut_tower), unfrozen, pad_id)
        self.side = side
        self.pools_one_position = tower.pools_one_position

    @property
    def is_small(self) -> bool:
        """Whether the top is one layer that is computed at one position."""
        return self.pools_one_position and len(layers_of(self.tower, self.side)) == 1


class _ImageTop(_HuggingFaceTop):
    def forward(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return embeddings and last hidden states of images."""
        model: Any = self.tower
        out = self.run_from(states, lambda: model.get_image_features(pixel_values=states))
        return embeddings_and_states(model, out)

    def pooled(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the embeddings. CLIP's last layer is computed at its first position only."""
        if not self.pools_one_position:
            return super().pooled(states)
        layer = layers_of(self.tower, "image")[-1]
        return image_at_first(self.tower, entering(layer, lambda: self.forward(states)))


class _TextTop(_HuggingFaceTop):
    def forward(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return embeddings and last hidden states of texts."""
        assert ids is not None
        mask = None if architecture_of(self.tower).pads_texts else mask
        out = self.run_from(states, lambda: text_features(self.tower, ids, mask))
        return embeddings_and_states(self.tower, out)

    def pooled(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the embeddings. CLIP's last layer is computed at the end token only."""
        if not self.pools_one_position:
            return super().pooled(states, ids, mask)
        assert ids is not None
        layer = layers_of(self.tower, "text")[-1]
        return text_at_end(self.tower, entering(layer, lambda: self.forward(states, ids, mask)), ids)
