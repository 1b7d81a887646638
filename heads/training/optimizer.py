"""AdamW and its learning rate.

PyTorch's own fused kernel, without the class around it: constructing a ``torch.optim.Optimizer`` imports PyTorch's
compiler, one second per process, and stepping it, with a count of steps for each parameter, costs a sixth of a step of
a head. The tests hold both classes equal to ``torch.optim.AdamW`` and ``ReduceLROnPlateau``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass
class _Group:
    parameters: list[Parameter]
    rate: float
    means: list[Tensor] = field(init=False)
    squares: list[Tensor] = field(init=False)
    steps: Tensor = field(init=False)  # how many were taken

    def __post_init__(self) -> None:
        self.means = [torch.zeros_like(each) for each in self.parameters]
        self.squares = [torch.zeros_like(each) for each in self.parameters]
        self.steps = torch.zeros((), device=self.parameters[0].device)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019).

    Parameters
    ----------
    groups
        Parameters and their learning rate; every parameter gets a gradient in every step.
    weight_decay
        Of all of them.
    """

    def __init__(self, groups: Iterable[tuple[Iterable[Parameter], float]], weight_decay: float) -> None:
        self.groups = [_Group(list(parameters), rate) for parameters, rate in groups]
        self.weight_decay = weight_decay
        self.factor = 1.0  # of every group's rate

    def state(self) -> list[list[Tensor]]:
        """Return what has been gathered over the steps; of each group its means, squares and number of steps."""
        return [[*group.means, *group.squares, group.steps] for group in self.groups]

    @torch.no_grad()
    def load_state(self, state: list[list[Tensor]]) -> None:
        """Go on from what ``state`` returned, of an optimizer with the same parameters."""
        for mine, stored in zip(self.state(), state, strict=True):
            for tensor, value in zip(mine, stored, strict=True):
                tensor.copy_(value)

    @torch.no_grad()
    def step(self) -> None:
        """Take a step and drop the gradients."""
        for group in self.groups:
            group.steps += 1
            torch._fused_adamw_(
                list[Tensor](group.parameters),
                [each.grad for each in group.parameters if each.grad is not None],
                group.means,
                group.squares,
                [],
                [group.steps] * len(group.parameters),
                amsgrad=False,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                lr=group.rate * self.factor,
                weight_decay=self.weight_decay,
                eps=_EPSILON,
                maximize=False,
            )
            for each in group.parameters:
                each.grad = None


class Plateau:
    """ReduceLROnPlateau on a score that should rise: a factor that shrinks when the score has not risen for a while.

    Parameters
    ----------
    factor
        By which the rate is multiplied.
    patience
        Epochs without a rise that are borne; the one after them shrinks the rate.
    """

    def __init__(self, factor: float, patience: int) -> None:
        self.factor, self.patience = factor, patience
        self.best, self.bad, self.scale = -math.inf, 0, 1.0

    def step(self, score: float) -> float:
        """Take the score of an epoch; return what the first rate is to be multiplied with from now on."""
        if score > self.best * (1 + 1e-4) or self.best == -math.inf:
            self.best, self.bad = score, 0
        else:
            self.bad += 1
        if self.bad > self.patience:
            self.scale, self.bad = self.scale * self.factor, 0
        return self.scale
