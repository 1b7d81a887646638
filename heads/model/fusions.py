"""Fusions: how image and text become what the MLP sees. Each is a small class, registered by name.

v is the image embedding and t the text embedding, both standardised, (n, d). A fusion returns one tensor for each MLP
that it needs; only late fusion needs two.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...cache.errors import MmcliError
from .attention import CrossAttention
from .inputs import Batch


class Sizes(NamedTuple):
    """Lengths of embeddings, and widths of token states (0 without token states)."""

    image: int
    text: int
    image_tokens: int = 0
    text_tokens: int = 0


class Fusion(nn.Module):
    """Map a batch to the inputs of the MLPs; MLP k sees (n, out_sizes[k])."""

    formula: ClassVar[str]
    source: ClassVar[str]
    equal_halves: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False
    has_weights: ClassVar[bool] = False
    out_sizes: tuple[int, ...]

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        if self.equal_halves and sizes.image != sizes.text:
            raise MmcliError(
                f"{type(self).__name__} joins v and t number by number, so both must have the same length; found "
                f"{sizes.image} and {sizes.text}: use another fusion"
            )
        if self.needs_tokens and not (sizes.image_tokens and sizes.text_tokens):
            raise MmcliError(
                "cross_attn needs token states: run `mmcli featurize` with --tokens, or use another fusion"
            )


class ImageOnly(Fusion):
    """Return v alone, for ``--modality image``."""

    formula = "v"
    source = ""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.out_sizes = (sizes.image,)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return v."""
        return (batch.image,)


class TextOnly(Fusion):
    """Return t alone, for ``--modality text``."""

    formula = "t"
    source = ""

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

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.out_sizes = (sizes.image + sizes.text,)

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
        self.out_sizes = (sizes.image + sizes.text,)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return (n, 2 d)."""
        gamma, beta = self.modulation(batch.text).chunk(2, dim=1)
        return (torch.cat([torch.addcmul(batch.image + beta, gamma, batch.image), batch.text], dim=1),)


class CrossAttn(Fusion):
    """Return [sigmoid(a) pool(attention(Q = text tokens, K = V = image tokens)); t; v]; a starts at -4.

    This is the crossmodal attention of Tsai et al., Multimodal Transformer for Unaligned Multimodal Language Sequences,
    ACL 2019, with one layer behind a gate that starts almost closed.
    """

    formula = "[σ(a) pool(attn(Q = text tokens, K = V = image tokens)); t; v]"
    source = "Tsai et al. 2019, one layer behind a gate"
    has_weights = True
    needs_tokens = True

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.attention = CrossAttention(sizes.text_tokens, sizes.image_tokens)
        self.out_sizes = (self.attention.out_size + sizes.text + sizes.image,)

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
    """Return the fusion called ``name``; for a single modality, the class that passes on this modality.

    Raises
    ------
    MmcliError
        No fusion has this name; the message lists the names.
    """
    if name not in FUSIONS:
        raise MmcliError(f"unknown fusion {name!r}: choose one of {', '.join(FUSIONS)}")
    return {"both": FUSIONS[name], "image": ImageOnly, "text": TextOnly}[modality]


def refuse_weights(fusion: type[Fusion], name: str) -> None:
    """Raise an MmcliError where the fusion has weights, which a linear head cannot learn."""
    if fusion.has_weights:
        raise MmcliError(
            f"the linear head cannot learn the weights of {name}: use concat, product or late, or --head mlp"
        )
