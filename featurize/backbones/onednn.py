"""Layers for inference in bfloat16 on a CPU, by the operators of oneDNN. Importing this imports torch.

``nn.Linear`` brings its weight into the order in which oneDNN computes anew in every call, a tenth of the call; here it
is done once. An activation that follows a convolution is a pass over memory of its own; here it is done while the
result is in a register. What comes out is the same: to the bit on a Zen 4, where it was measured. PyTorch's own
compiler replaces layers by the same operators.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn


def can_be_used(device: str, dtype: str) -> bool:
    """Whether these layers are of use on ``device`` in ``dtype``, and this build of PyTorch has what they need."""
    return (device, dtype) == ("cpu", "bfloat16") and torch.backends.mkldnn.is_available() and _works()


@functools.cache
def _works() -> bool:
    broken = contextlib.suppress(AttributeError, RuntimeError, TypeError)
    with torch.inference_mode(), torch.random.fork_rng(devices=[]), broken:
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            linear, rows = nn.Linear(16, 16).bfloat16(), torch.ones(2, 16)
            convolution: Any = nn.Conv2d(16, 16, 1)
            convolution.static_padding = nn.Identity()
            ConvReLU6(convolution)(torch.ones(1, 16, 4, 4))
            return torch.allclose(PackedLinear(linear)(rows), linear(rows.bfloat16()), rtol=2**-7, atol=2**-7)
    return False


class PackedLinear(nn.Module):
    """An ``nn.Linear`` whose weight is in oneDNN's order; it has no parameters, and cannot be moved or saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16())
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    @property
    def weight(self) -> Tensor:
        """The weight, (out, in) bfloat16, in its usual order: a copy."""
        weight: Tensor = self._packed.to_dense()
        return weight

    def forward(self, rows: Tensor) -> Tensor:
        """Return the product, (..., out) bfloat16."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows.bfloat16(), self._packed, self.bias, "none", [], "")
        return result


class ConvReLU6(nn.Module):
    """A convolution, its ``static_padding`` before it, and ReLU6 after it."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.convolution = convolution.bfloat16()

    def forward(self, maps: Tensor) -> Tensor:
        """Return feature maps, (B, channels, H, W) bfloat16."""
        each = self.convolution
        how = [list(each.padding), list(each.stride), list(each.dilation), each.groups]
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            each.static_padding(maps.bfloat16()), each.weight, each.bias, *how, "hardtanh", [0.0, 6.0], ""
        )
        return result


def pack(model: nn.Module) -> None:
    """Replace each ``nn.Linear`` in ``model`` by a ``PackedLinear``."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:  # subclasses may be used otherwise than by calling them
                setattr(module, name, PackedLinear(child))
