"""A loaded Hugging Face dual encoder. Importing this imports torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor, nn

from .base import MAX_TOKENS, Encoded
from .one_position import at_position, pools_one_position
from .tensors import TorchEncoder, computing, in_turn, pad, ready, to_device, to_float, to_half, tokenize
from .towers import Top, check_layers, cut, entering, freeze_unused, layers_of, with_children


class HuggingFaceEncoder(TorchEncoder):
    """A loaded dual encoder; ``prepare`` makes pixels, (3, H, W) float32, of an RGB image."""

    def __init__(self, model: Any, prepare: Any, tokenizer: Any, device: str, dtype: str) -> None:
        super().__init__(device, dtype)
        self.model = ready(model, device, dtype)
        self.tokenizer = tokenizer
        self.prepare = prepare
        self.max_tokens = min(MAX_TOKENS, getattr(model.config.text_config, "max_position_embeddings", MAX_TOKENS))
        # SigLIP was trained on texts padded to its full length, without a mask, and pools the last position.
        self.pads_to_full_length = model.config.model_type.startswith("siglip")

    def prepare_image(self, image: Image) -> NDArray[np.float32]:
        """Prepare one RGB image as the model's own processor does."""
        return self.prepare(image)

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Tokenize with the model's own tokenizer."""
        return tokenize(self.tokenizer, texts, self.max_tokens)

    @in_turn
    def encode_images(self, pixels: NDArray[np.float32], tokens: bool = False) -> Encoded:
        """Encode prepared images, (B, 3, H, W) float32."""
        if not tokens and pools_one_position(self.model, "vision_model"):
            states = entering(self.vision_layers()[-1], lambda: self._run_images(pixels))
            with computing(self.device, self.dtype):
                return Encoded(to_float(image_at_first(self.model, states)))
        pooled, states = embeddings_and_states(self.model, self._run_images(pixels))
        return Encoded(to_float(pooled), list(to_half(states)) if tokens else None)

    @in_turn
    def encode_texts(self, ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode B token lists, padded to the longest of them (SigLIP: to its full length)."""
        if not tokens and pools_one_position(self.model, "text_model"):
            padded, mask = self._pad(ids)
            states = entering(self.text_layers()[-1], lambda: self._run_texts(padded, mask))
            with computing(self.device, self.dtype):
                return Encoded(to_float(text_at_end(self.model, states, padded)))
        pooled, states = embeddings_and_states(self.model, self._run_texts(*self._pad(ids)))
        return Encoded(to_float(pooled), self._own(to_half(states), ids) if tokens else None)

    @in_turn
    def images_below(self, pixels: NDArray[np.float32], layers: int) -> NDArray[np.float32]:
        """Return what enters the last ``layers`` layers for prepared images, (B, P, w)."""
        return to_float(entering(self.vision_layers()[-layers], lambda: self._run_images(pixels)))

    @in_turn
    def texts_below(self, ids: Sequence[Sequence[int]], layers: int) -> list[NDArray[np.float32]]:
        """Return what enters the last ``layers`` layers for B token lists, (L, w) each (SigLIP: of its full length)."""
        padded = self._pad(ids)
        return self._own(to_float(entering(self.text_layers()[-layers], lambda: self._run_texts(*padded))), ids)

    def _run_images(self, pixels: NDArray[np.float32]) -> Any:
        with computing(self.device, self.dtype):
            return self.model.get_image_features(pixel_values=to_device(pixels, self.device))

    def _run_texts(self, padded: Tensor, mask: Tensor) -> Any:
        with computing(self.device, self.dtype):
            return text_features(self.model, padded, None if self.pads_to_full_length else mask)

    def _pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        full = self.max_tokens if self.pads_to_full_length else None
        return pad(ids, self.tokenizer.pad_token_id, self.device, full)

    def _own(self, states: NDArray[Any], ids: Sequence[Sequence[int]]) -> list[NDArray[Any]]:
        """Return the states of each text without those of its padding, which SigLIP looks at, too."""
        if self.pads_to_full_length:
            return list(states)
        return [state[: len(row)] for state, row in zip(states, ids, strict=True)]

    def text_layers(self) -> list[nn.Module]:
        """Return the transformer layers of the text tower."""
        return layers_of(self.model, "text_model")

    def vision_layers(self) -> list[nn.Module]:
        """Return the transformer layers of the image tower."""
        return layers_of(self.model, "vision_model")

    def image_top(self, layers: int) -> Top:
        """Return the last layers of the image tower, its last norm, and the projection."""
        check_layers(self.vision_layers(), layers, "image")
        size = self.model.config.vision_config.image_size
        pixels = np.zeros((1, 3, *(size if isinstance(size, list | tuple) else (size, size))), np.float32)
        top = _ImageTop(self.model, layers)
        return freeze_unused(top, self.images_below(pixels, layers), self.encode_images(pixels).pooled)

    def text_top(self, layers: int) -> Top:
        """Return the last layers of the text tower, its last norm, and the projection."""
        check_layers(self.text_layers(), layers, "text")
        top = _TextTop(self.model, layers, self.tokenizer.pad_token_id, masked=not self.pads_to_full_length)
        ids = [[0, 1, 2]]
        return freeze_unused(
            top, np.stack(self.texts_below(ids, layers)), self.encode_texts(ids).pooled, *self._pad(ids)
        )


def embeddings_and_states(model: Any, out: Any) -> tuple[Tensor, Tensor]:
    """Return the embeddings, (B, d), and last hidden states, (B, P, w), of what a tower of ``model`` returned."""
    # FLAVA projects every position; as in its own contrastive loss, the first is the embedding.
    pooled = out.pooler_output[:, 0] if model.config.model_type == "flava" else out.pooler_output
    states = out.last_hidden_state
    return pooled, states.flatten(2).transpose(1, 2) if states.ndim == 4 else states  # ALIGN: feature maps


def text_features(model: Any, ids: Tensor, mask: Tensor | None) -> Any:
    """Return what the model makes of token ids, (B, L); without a mask, every position is looked at."""
    return model.get_text_features(input_ids=ids, **({} if mask is None else {"attention_mask": mask}))


def image_at_first(model: Any, entered: Tensor) -> Tensor:
    """Return the embeddings, (B, d), of images, given what enters the last layer, (B, P, w); CLIP pools position 0."""
    first = torch.zeros(len(entered), dtype=torch.int64, device=entered.device)
    state = at_position(layers_of(model, "vision_model")[-1], entered, first, None)
    embeddings: Tensor = model.visual_projection(model.vision_model.post_layernorm(state))
    return embeddings


def text_at_end(model: Any, entered: Tensor, ids: Tensor) -> Tensor:
    """Return the embeddings, (B, d), of texts, given what enters the last layer, (B, L, w), and token ids, (B, L)."""
    # As in CLIPTextModel.forward: old configurations call the end token 2, and it is the highest id.
    end = model.text_model.eos_token_id
    place = ids.argmax(dim=1) if end == 2 else (ids == end).int().argmax(dim=1)
    before = torch.arange(ids.shape[1], device=ids.device) <= place[:, None]
    state = at_position(layers_of(model, "text_model")[-1], entered, place, before)
    embeddings: Tensor = model.text_projection(model.text_model.final_layer_norm(state))
    return embeddings


def _is_small(model: Any, tower: str) -> bool:
    return len(layers_of(model, tower)) == 1 and pools_one_position(model, tower)


class _ImageTop(Top):
    def __init__(self, model: Any, layers: int) -> None:
        tower, unfrozen = cut(model.vision_model, layers)
        super().__init__(with_children(model, vision_model=tower, text_model=None, text_projection=None), unfrozen)

    @property
    def is_small(self) -> bool:
        """So it is with one layer, of which one position is computed."""
        return _is_small(self.tower, "vision_model")

    def forward(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return embeddings and last hidden states of images."""
        model: Any = self.tower
        out = self.run_from(states, lambda: model.get_image_features(pixel_values=states))
        return embeddings_and_states(model, out)

    def pooled(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the embeddings; of CLIP, of whose last layer only the first position is looked at, at a fraction."""
        model: Any = self.tower
        if not pools_one_position(model, "vision_model"):
            return super().pooled(states)
        layer = layers_of(model, "vision_model")[-1]
        return image_at_first(model, entering(layer, lambda: self.forward(states)))


class _TextTop(Top):
    def __init__(self, model: Any, layers: int, pad_id: int, masked: bool) -> None:
        tower, unfrozen = cut(model.text_model, layers)
        made = with_children(model, text_model=tower, vision_model=None, visual_projection=None)
        super().__init__(made, unfrozen, pad_id)
        self.masked = masked

    @property
    def is_small(self) -> bool:
        """So it is with one layer, of which one position is computed."""
        return _is_small(self.tower, "text_model")

    def forward(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return embeddings and last hidden states of texts."""
        assert ids is not None
        out = self.run_from(states, lambda: text_features(self.tower, ids, mask if self.masked else None))
        return embeddings_and_states(self.tower, out)

    def pooled(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the embeddings; of CLIP, of whose last layer only the end token is looked at, at a fraction."""
        model: Any = self.tower
        if not pools_one_position(model, "text_model"):
            return super().pooled(states, ids, mask)
        assert ids is not None
        layer = layers_of(model, "text_model")[-1]
        return text_at_end(model, entering(layer, lambda: self.forward(states, ids, mask)), ids)
