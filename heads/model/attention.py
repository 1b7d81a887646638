"""Cross-attention from text tokens to image tokens, and the standardised projection of tokens."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .inputs import TokenBatch

_WIDTH = 128
_KEY_WIDTH = 64  # queries and keys cost most, and a map of 49 places needs no more
_HEADS = 4
_GATE_START = -4.0


class TokenProjection(nn.Module):
    """Standardise token states and project them: W ((x - mean) * scale) + b, from (..., w) to (..., width).

    The standardisation is folded into the matrix, so that the tokens are read only once.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, in_size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(in_size))
        self.register_buffer("scale", torch.ones(in_size))
        self.linear = nn.Linear(in_size, width)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return the matrix and bias that apply to raw token states."""
        weight = self.linear.weight * self.scale
        return weight, self.linear.bias - weight @ self.mean

    def forward(self, tokens: Tensor) -> Tensor:
        """Project raw token states, (..., w) to (..., width)."""
        return functional.linear(tokens, *self.folded())


class CrossAttention(nn.Module):
    """Compute sigmoid(a) times the mean over a text's tokens of attention(Q = text tokens, K = V = image tokens).

    This is scaled dot-product attention with several heads (Vaswani et al., Attention Is All You Need, 2017). It has no
    output projection, because the MLP that follows begins with one. The mean over text tokens is taken before the
    values are projected: mean_l(A_l (X W)) = (mean_l A_l) X W, at a fraction of the cost.

    Parameters
    ----------
    text_width, image_width
        Widths of the token states, w_t and w_i.
    width, key_width
        Width of the values and so of the result, and width of queries and keys; each over all heads.
    heads
        Number of heads.
    """

    def __init__(
        self,
        text_width: int,
        image_width: int,
        width: int = _WIDTH,
        key_width: int = _KEY_WIDTH,
        heads: int = _HEADS,
    ) -> None:
        super().__init__()
        self.heads, self.out_size = heads, width
        self.query = TokenProjection(text_width, key_width)
        self.key = TokenProjection(image_width, key_width)
        self.value = TokenProjection(image_width, width)
        self.gate = nn.Parameter(torch.tensor(_GATE_START))

    def learn_inputs(self, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor]) -> None:
        """Set (mean, scale) of text tokens and of image tokens in the training rows."""
        for projection, (mean, scale) in ((self.query, text), (self.key, image), (self.value, image)):
            projection.mean.copy_(mean)
            projection.scale.copy_(scale)

    def forward(self, tokens: TokenBatch) -> Tensor:
        """Return (b, width); a text without tokens gives zeros."""
        image, text, mask = tokens.image.float(), tokens.text.float(), tokens.mask
        queries = self.query(text).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (b, heads, L, key_width / heads)
        keys = self.key(image).unflatten(2, (self.heads, -1)).transpose(1, 2)
        attention = torch.softmax(queries @ keys.transpose(2, 3) / math.sqrt(keys.shape[3]), dim=3)
        share = mask / mask.sum(dim=1, keepdim=True).clamp_min(1)  # (b, L)
        pooled = torch.einsum("bl,bhlp->bhp", share, attention) @ image  # (b, heads, w_i)
        weight, bias = self.value.folded()
        values = torch.einsum("bhi,hwi->bhw", pooled, weight.unflatten(0, (self.heads, -1))).flatten(1)
        return torch.sigmoid(self.gate) * (values + bias * share.sum(dim=1, keepdim=True))
