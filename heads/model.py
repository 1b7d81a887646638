"""The head: embeddings to logits."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..cache.errors import MmcliError
from .fusions import make_fusion

Modality = Literal["both", "text", "image"]


class Standardise(nn.Module):
    """L2-normalise each row, then subtract the mean and divide by the deviation of the training rows."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def learn(self, rows: Tensor) -> None:
        """Take mean and deviation from the training rows, (n, d)."""
        unit = functional.normalize(rows.float())
        self.mean = unit.mean(dim=0)
        # A constant column carries nothing: it becomes 0, not noise divided by almost 0.
        deviation = unit.std(dim=0, correction=0)
        self.scale = torch.where(deviation > 1e-7, 1 / deviation.clamp_min(1e-7), torch.zeros_like(deviation))

    def forward(self, rows: Tensor) -> Tensor:
        """Return standardised rows, (n, d) float32."""
        return (functional.normalize(rows.float()) - self.mean) * self.scale


class Head(nn.Module):
    """Standardised embeddings, a fusion, an MLP [in, 256, 64, C] with BatchNorm, ReLU and dropout.

    A single-modality head sees its own embedding only, in training and in evaluation.

    Parameters
    ----------
    dim
        Length d of an embedding.
    n_classes
        C.
    fusion
        Name of the fusion; used with ``modality="both"``.
    modality
        ``both``, ``text`` or ``image``.
    hidden
        Widths of the hidden layers.
    dropout
        After each hidden layer.
    """

    def __init__(
        self,
        dim: int,
        n_classes: int,
        fusion: str = "concat",
        modality: str = "both",
        hidden: tuple[int, ...] = (256, 64),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if modality not in get_args(Modality):
            raise MmcliError(f"unknown modality {modality!r}: choose one of {', '.join(get_args(Modality))}")
        self.modality = modality
        self.image_input = None if modality == "text" else Standardise(dim)
        self.text_input = None if modality == "image" else Standardise(dim)
        self.fusion = make_fusion(fusion, dim) if modality == "both" else None
        width = self.fusion.out_size if self.fusion is not None else dim
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Dropout(dropout)]
            width = size
        self.mlp = nn.Sequential(*layers, nn.Linear(width, n_classes))

    def learn_inputs(self, image: Tensor, text: Tensor) -> None:
        """Take the standardisation from the training rows, (n, d) each."""
        if self.image_input is not None:
            self.image_input.learn(image)
        if self.text_input is not None:
            self.text_input.learn(text)

    def standardised(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the fusion sees of each; an input that the head does not use is returned as it is."""
        return (
            image if self.image_input is None else self.image_input(image),
            text if self.text_input is None else self.text_input(text),
        )

    def classify(self, image: Tensor, text: Tensor) -> Tensor:
        """Return logits, (n, C), of standardised inputs."""
        single = text if self.modality == "text" else image
        logits: Tensor = self.mlp(single if self.fusion is None else self.fusion(image, text))
        return logits

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return logits, (n, C), of raw embeddings, (n, d) each."""
        return self.classify(*self.standardised(image, text))

    def n_parameters(self) -> int:
        """Count the trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
