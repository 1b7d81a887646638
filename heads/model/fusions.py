"""Fusions: how image and text become what the MLP sees. For a new fusion, write a class and a line in ``FUSIONS``.

v is the image embedding and t the text embedding, both standardised, (n, d). A fusion returns one tensor for each MLP
that it needs; only late fusion needs two.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...cache.errors import MmcliError
from ...cache.features import Features
from .inputs import Batch, Moments, TokenBatch, batches


class Sizes(NamedTuple):
    """Lengths of embeddings, and widths of token states (0 without token states)."""

    image: int
    text: int
    image_tokens: int = 0
    text_tokens: int = 0


class Fusion(nn.Module):
    """Map a batch to the inputs of the MLPs; MLP k sees (n, out_sizes[k])."""

    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    equal_halves: ClassVar[bool] = False  # whether image and text embedding must have the same length
    needs_tokens: ClassVar[bool] = False
    has_weights: ClassVar[bool] = False  # of its own, which a linear head cannot learn
    rate: ClassVar[str] = "lr"  # the setting with the learning rate of these weights

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.out_sizes: tuple[int, ...] = (sizes.image + sizes.text,)  # fusions that return anything else set their own
        if self.equal_halves and sizes.image != sizes.text:
            raise MmcliError(
                f"{type(self).__name__} joins v and t number by number, so both must have the same length; found "
                f"{sizes.image} and {sizes.text}: use another fusion"
            )
        if self.needs_tokens and not (sizes.image_tokens and sizes.text_tokens):
            (name,) = (name for name, fusion in FUSIONS.items() if fusion is type(self))
            raise MmcliError(f"{name} needs token states: run `mmcli featurize` with --tokens, or use another fusion")

    def learn_inputs(self, features: Features) -> None:
        """Learn from the training rows what the fusion must know of its inputs; most fusions need nothing."""


class ImageOnly(Fusion):
    """Return v alone, for ``--modality image``."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.out_sizes = (sizes.image,)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return v."""
        return (batch.image,)


class TextOnly(Fusion):
    """Return t alone, for ``--modality text``."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.out_sizes = (sizes.text,)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return t."""
        return (batch.text,)


class Concat(Fusion):
    """Return [v; t]: early fusion, which scored best in the published report."""

    formula = "[v; t]"
    source = "early fusion, Snoek et al. 2005"

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return (n, 2 d)."""
        return (torch.cat([batch.image, batch.text], dim=1),)


class Gated(Fusion):
    """Return g v + (1 - g) t with one gate g = sigmoid(W [v; t] + b) per pair.

    This is a gated multimodal unit (Arevalo et al., Gated Multimodal Units for Information Fusion, 2017) with a scalar
    gate and without the tanh layers.
    """

    formula = "g v + (1 - g) t,  g = σ(W [v; t] + b)"
    source = "Arevalo et al. 2017, with a scalar gate"
    has_weights = True
    equal_halves = True

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.gate = nn.Linear(sizes.image + sizes.text, 1)
        self.out_sizes = (sizes.image,)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return (n, d)."""
        gate = torch.sigmoid(self.gate(torch.cat([batch.image, batch.text], dim=1)))
        return (gate * batch.image + (1 - gate) * batch.text,)


class Film(Fusion):
    """Return [gamma v + beta; t] with gamma = 1 + W_gamma t and beta = W_beta t: the text modulates the image.

    The source is Perez et al., FiLM: Visual Reasoning with a General Conditioning Layer, AAAI 2018. Both matrices start
    at 0, so that training starts from [v; t].
    """

    formula = "[γ ⊙ v + β; t],  γ = 1 + W_γ t,  β = W_β t"
    source = "Perez et al. 2018"
    has_weights = True

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.modulation = nn.Linear(sizes.text, 2 * sizes.image, bias=False)  # W_gamma and W_beta
        nn.init.zeros_(self.modulation.weight)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return (n, 2 d)."""
        gamma, beta = self.modulation(batch.text).chunk(2, dim=1)
        return (torch.cat([torch.addcmul(batch.image + beta, gamma, batch.image), batch.text], dim=1),)


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
    """

    heads = 4
    width = 128  # of the values of all heads, and so of the result
    key_width = 64  # queries and keys cost most, and a map of 49 places needs no more
    gate_start = -4.0  # almost closed

    def __init__(self, text_width: int, image_width: int) -> None:
        super().__init__()
        self.query = TokenProjection(text_width, self.key_width)
        self.key = TokenProjection(image_width, self.key_width)
        self.value = TokenProjection(image_width, self.width)
        self.gate = nn.Parameter(torch.tensor(self.gate_start))

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


class CrossAttn(Fusion):
    """Return [sigmoid(a) pool(attention(Q = text tokens, K = V = image tokens)); t; v]; a starts at -4.

    This is the crossmodal attention of Tsai et al., Multimodal Transformer for Unaligned Multimodal Language Sequences,
    ACL 2019, with one layer behind a gate that starts almost closed.
    """

    formula = "[σ(a) pool(attn(Q = text tokens, K = V = image tokens)); t; v]"
    source = "Tsai et al. 2019, one layer behind a gate"
    has_weights = True
    needs_tokens = True
    rate = "lr_attn"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.attention = CrossAttention(sizes.text_tokens, sizes.image_tokens)
        self.out_sizes = (self.attention.width + sizes.text + sizes.image,)

    def learn_inputs(self, features: Features) -> None:
        """Take mean and deviation of text tokens and of image tokens from the training rows."""
        query, key, value = self.attention.query, self.attention.key, self.attention.value
        text, image = Moments(len(query.mean)), Moments(len(key.mean))
        for batch in batches(features, True, "cpu"):
            assert batch.tokens is not None
            text.add(batch.tokens.text[batch.tokens.mask].double())
            image.add(batch.tokens.image.flatten(0, 1).double())
        for projection, moments in ((query, text), (key, image), (value, image)):
            for buffer, learned in zip((projection.mean, projection.scale), moments.mean_and_scale(), strict=True):
                buffer.copy_(learned)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return (n, width + 2 d)."""
        assert batch.tokens is not None  # the constructor refused sizes without token states
        return (torch.cat([self.attention(batch.tokens), batch.text, batch.image], dim=1),)


class Product(Fusion):
    """Return [v; t; v t]: with the element-wise product, one modality can reverse the meaning of the other.

    The product comes from Kim et al., Hadamard Product for Low-rank Bilinear Pooling, ICLR 2017, without its
    projections.
    """

    formula = "[v; t; v ⊙ t]"
    source = "Kim et al. 2017, without projections"
    equal_halves = True

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.out_sizes = (3 * sizes.image,)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return (n, 3 d)."""
        return (torch.cat([batch.image, batch.text, batch.image * batch.text], dim=1),)


class Late(Fusion):
    """Return v and t for two MLPs, each trained by its own loss; the head averages their logits.

    The source is Snoek et al., Early versus Late Fusion in Semantic Video Analysis, ACM Multimedia 2005.
    """

    formula = "(MLP_v(v) + MLP_t(t)) / 2"
    source = "late fusion, Snoek et al. 2005"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.out_sizes = (sizes.image, sizes.text)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return v and t."""
        return batch.image, batch.text


FUSIONS: dict[str, type[Fusion]] = {
    "concat": Concat,
    "gated": Gated,
    "film": Film,
    "cross_attn": CrossAttn,
    "product": Product,
    "late": Late,
}


def fusion_class(name: str, modality: str = "both") -> type[Fusion]:
    """Return the fusion called ``name``, or for a single modality the class that passes it on.

    Raise an MmcliError that lists the names where no fusion has this name.
    """
    if name not in FUSIONS:
        raise MmcliError(f"unknown fusion {name!r}: choose one of {', '.join(FUSIONS)}")
    return {"both": FUSIONS[name], "image": ImageOnly, "text": TextOnly}[modality]


def refuse_weights(fusion: type[Fusion], name: str) -> None:
    """Raise an MmcliError where the fusion has weights, which a linear head cannot learn."""
    if fusion.has_weights:
        *others, last = (other for other, fusion_type in FUSIONS.items() if not fusion_type.has_weights)
        raise MmcliError(
            f"the linear head cannot learn the weights of {name}: use {', '.join(others)} or {last}, or --head mlp"
        )
