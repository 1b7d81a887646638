"""Our optimizer and plateau against those of PyTorch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcli.heads.training.optimizer import AdamW, Plateau
from tolerances import EXACT


def test_adamw_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = (
        [torch.nn.Parameter(torch.full((3, 4), 0.5).double()), torch.nn.Parameter(torch.ones(2).double())]
        for _ in range(2)
    )
    first = AdamW([(ours[:1], 1e-2), (ours[1:], 1e-3)], weight_decay=0.1)
    groups = [{"params": theirs[:1], "lr": 1e-2}, {"params": theirs[1:], "lr": 1e-3}]
    second = torch.optim.AdamW(groups, weight_decay=0.1)
    for step in range(20):
        if step == 10:
            first.factor = 0.5
            for group in second.param_groups:
                group["lr"] *= 0.5
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        first.step()
        second.step()
        assert all(one.grad is None for one in ours)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.50001, 0.6, 0.9]), max_size=40), st.integers(0, 4))
def test_the_plateau_is_that_of_torch(scores, patience):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=patience, eps=0)
    ours = Plateau(0.5, patience)
    for score in scores:
        theirs.step(score)
        assert ours.step(score) == optimizer.param_groups[0]["lr"]
