"""How image and text embeddings become the input of the MLP.

One small class each, registered by name. v is the image embedding, t the text embedding, both standardised, (n, d).
"""

import torch
from torch import Tensor, nn

from ..cache.errors import MmcliError


class Fusion(nn.Module):
    """Maps v and t, (n, d) each, to (n, out_size)."""

    formula: str
    out_size: int


class Concat(Fusion):
    """[v; t]: the reference's winner."""

    formula = "[v; t]"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_size = 2 * dim

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return (n, 2 d)."""
        return torch.cat([image, text], dim=1)


FUSIONS: dict[str, type[Fusion]] = {"concat": Concat}


def make_fusion(name: str, dim: int) -> Fusion:
    """Return the fusion called ``name`` for embeddings of length ``dim``.

    Raises
    ------
    MmcliError
        Naming those that there are.
    """
    if name not in FUSIONS:
        raise MmcliError(f"unknown fusion {name!r}: choose one of {', '.join(FUSIONS)}")
    return FUSIONS[name](dim)
