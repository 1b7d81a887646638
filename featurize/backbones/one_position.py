"""A CLIP layer at one position. Importing this imports torch.

CLIP pools one position of its last layer, and nothing else of it is looked at. So only this one has to be computed: a
single query, whose scores and values need no keys and values of the others, since

    q . (W h + b) = (q W) . h + q . b        and        sum_l a_l (W h_l + b) = W (sum_l a_l h_l) + b.

The cost of the layer falls from that of all positions to that of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Towers, by model type, whose layers and whose way from the last layer to the embedding are those written here.
_TOWERS = {"clip": ("vision_model", "text_model"), "chinese_clip": ("vision_model",)}


def pools_one_position(model: Any, tower: str) -> bool:
    """Whether the embeddings of a tower can be had by ``at_position``; of other models the whole layer is computed."""
    return tower in _TOWERS.get(model.config.model_type, ())


def at_position(layer: Any, states: Tensor, place: Tensor, seen: Tensor | None) -> Tensor:
    """Return what comes out of ``layer`` at one position of each row, (b, w).

    Parameters
    ----------
    layer
        A CLIP encoder layer, in evaluation mode.
    states
        What enters it, (b, L, w).
    place
        The position, (b,) int64.
    seen
        Which positions it attends to, (b, L) bool; None for all.
    """
    attention = layer.self_attn
    rows = torch.arange(len(states), device=states.device)
    normed = layer.layer_norm1(states)
    heads = (attention.num_heads, attention.head_dim)
    query = (attention.q_proj(normed[rows, place]) * attention.scale).unflatten(1, heads)  # (b, heads, w / heads)
    key, value = attention.k_proj, attention.v_proj
    towards = torch.einsum("bhd,hdw->bhw", query, key.weight.unflatten(0, heads))
    constant = (query * key.bias.unflatten(0, heads)).sum(dim=2, keepdim=True)
    scores = towards @ normed.transpose(1, 2) + constant  # (b, heads, L)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
    mixed = torch.softmax(scores, dim=2) @ normed  # (b, heads, w)
    values = torch.einsum("bhw,hdw->bhd", mixed, value.weight.unflatten(0, heads)).flatten(1) + value.bias
    here = states[rows, place] + attention.out_proj(values)
    result: Tensor = here + layer.mlp(layer.layer_norm2(here))
    return result
