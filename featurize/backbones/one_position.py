"""A CLIP layer at one position. Importing this module imports torch.

CLIP pools one position of its last layer and ignores the others. So a single query is enough, and with one query the
keys and values of the other positions need not be computed, because

    q . (W h + b) = (q W) . h + q . b        and        sum_l a_l (W h_l + b) = W (sum_l a_l h_l) + b.

The layer then costs about as much as for one position alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def at_position(layer: Any, states: Tensor, position: Tensor, attended: Tensor | None) -> Tensor:
    """Return the output of ``layer`` at one position of each row, (b, w).

    Parameters
    ----------
    layer
        A CLIP encoder layer, in evaluation mode.
    states
        Input of the layer, (b, L, w).
    position
        (b,) int64.
    attended
        Positions that the query attends to, (b, L) bool. None: all.
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
