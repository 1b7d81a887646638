"""A loaded Hugging Face dual encoder. Importing this module imports torch.

CLIP pools one position of its last layer and ignores the others, so ``at_position`` computes the layer there only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .base import MAX_TOKENS, Encoded
from .tensors import TorchEncoder, to_float, to_half
from .towers import Top, architecture_of, check_layers, cut, entering, freeze_unused, layers_of, without_other_tower


class HuggingFaceEncoder(TorchEncoder):
    """A loaded dual encoder."""

    def __init__(self, model: Any, prepare: Any, tokenizer: Any, device: str, dtype: str) -> None:
        super().__init__(tokenizer, prepare, device, dtype)
        self.model = self._ready(model)
        self.max_tokens = min(MAX_TOKENS, getattr(model.config.text_config, "max_position_embeddings", MAX_TOKENS))
        self.architecture = architecture_of(model)
        self.pads_texts = self.architecture.pads_texts

    def encode_images(self, pixels: NDArray[np.float32], tokens: bool = False) -> Encoded:
        """Encode prepared images, (B, 3, H, W) float32."""
        with self._turn(len(pixels)):
            if not tokens and self.architecture.image.pools_one_position:
                states = entering(self.vision_layers()[-1], lambda: self._run_images(pixels))
                with self._computing():
                    return Encoded(to_float(image_at_first(self.model, states)))
            pooled, states = embeddings_and_states(self.model, self._run_images(pixels))
            return Encoded(to_float(pooled), list(to_half(states)) if tokens else None)

    def encode_texts(self, ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode B token lists, padded to the longest of them (SigLIP: to the full length)."""
        with self._turn(len(ids)):
            padded, mask = self._pad(ids)
            if not tokens and self.architecture.text.pools_one_position:
                states = entering(self.text_layers()[-1], lambda: self._run_texts(padded, mask))
                with self._computing():
                    return Encoded(to_float(text_at_end(self.model, states, padded)))
            pooled, states = embeddings_and_states(self.model, self._run_texts(padded, mask))
            return Encoded(to_float(pooled), self._own(to_half(states), ids) if tokens else None)

    def _run_images(self, pixels: NDArray[np.float32]) -> Any:
        with self._computing():
            return self.model.get_image_features(pixel_values=torch.from_numpy(pixels).to(self.device))

    def _run_texts(self, padded: Tensor, mask: Tensor) -> Any:
        with self._computing():
            return text_features(self.model, padded, mask)

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
        top = _HuggingFaceTop(self.model, "image", layers)
        return freeze_unused(top, self.images_below(pixels, layers), self.encode_images(pixels).pooled)

    def text_top(self, layers: int) -> Top:
        """Return the last layers of the text tower, its last norm, and the projection."""
        check_layers(self.text_layers(), layers, "text")
        top = _HuggingFaceTop(self.model, "text", layers, self.tokenizer.pad_token_id)
        ids = [[0, 1, 2]]
        entered = np.stack(self.texts_below(ids, layers))
        return freeze_unused(top, entered, self.encode_texts(ids).pooled, *self._pad(ids))


def embeddings_and_states(model: Any, out: Any) -> tuple[Tensor, Tensor]:
    """Return the embeddings, (B, d), and last hidden states, (B, P, w), from the output of a tower of ``model``."""
    pooled = out.pooler_output[:, 0] if architecture_of(model).projects_each_position else out.pooler_output
    states = out.last_hidden_state
    return pooled, states.flatten(2).transpose(1, 2) if states.ndim == 4 else states  # 4: ALIGN's feature maps


def text_features(model: Any, ids: Tensor, mask: Tensor | None) -> Any:
    """Return the model's output for token ids, (B, L). A model that pads its texts attends to every position."""
    if mask is None or architecture_of(model).pads_texts:
        return model.get_text_features(input_ids=ids)
    return model.get_text_features(input_ids=ids, attention_mask=mask)


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


def at_position(layer: Any, states: Tensor, position: Tensor, attended: Tensor | None) -> Tensor:
    """Return the output of a CLIP encoder layer at one position of each row, (b, w).

    ``states`` enter the layer, (b, L, w); ``position`` is (b,) int64; the query attends to the positions ``attended``,
    (b, L) bool, or to all. With one query, the keys and values of the other positions need not be computed, because

        q . (W h + b) = (q W) . h + q . b        and        sum_l a_l (W h_l + b) = W (sum_l a_l h_l) + b.

    The layer then costs about as much as for one position alone.
    """
    attention = layer.self_attn
    rows = torch.arange(len(states), device=states.device)
    normed = layer.layer_norm1(states)
    heads = (attention.num_heads, attention.head_dim)
    query = (attention.q_proj(normed[rows, position]) * attention.scale).unflatten(1, heads)  # (b, heads, w / heads)
    key, value = attention.k_proj, attention.v_proj
    projected_query = torch.einsum("bhd,hdw->bhw", query, key.weight.unflatten(0, heads))
    constant = (query * key.bias.unflatten(0, heads)).sum(dim=2, keepdim=True)
    scores = projected_query @ normed.transpose(1, 2) + constant  # (b, heads, L)
    if attended is not None:
        scores = scores.masked_fill(~attended[:, None], float("-inf"))
    mixed = torch.softmax(scores, dim=2) @ normed  # (b, heads, w)
    values = torch.einsum("bhw,hdw->bhd", mixed, value.weight.unflatten(0, heads)).flatten(1) + value.bias
    residual = states[rows, position] + attention.out_proj(values)
    result: Tensor = residual + layer.mlp(layer.layer_norm2(residual))
    return result


class _HuggingFaceTop(Top):
    def __init__(self, model: Any, side: str, layers: int, pad_id: int = 0) -> None:
        tower = architecture_of(model).tower(side)
        cut_tower, unfrozen = cut(getattr(model, tower.module), tower, layers)
        super().__init__(without_other_tower(model, side, cut_tower), unfrozen, pad_id)
        self.side = side
        self.pools_one_position = tower.pools_one_position
        self.is_small = tower.pools_one_position and layers == 1

    def forward(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        model: Any = self.tower

        def run() -> Any:
            return model.get_image_features(pixel_values=states) if ids is None else text_features(model, ids, mask)

        return embeddings_and_states(model, self.run_from(states, run))

    def pooled(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if not self.pools_one_position:
            return super().pooled(states, ids, mask)
        layer = layers_of(self.tower, self.side)[-1]
        entered = entering(layer, lambda: self.forward(states, ids, mask))
        return image_at_first(self.tower, entered) if ids is None else text_at_end(self.tower, entered, ids)
