"""Layers by oneDNN's operators give what the layers give in exact arithmetic, but for rounding to bfloat16."""

import copy

import pytest

torch = pytest.importorskip("torch")
from mmcli.featurize.backbones import onednn  # noqa: E402

pytestmark = pytest.mark.skipif(
    not onednn.can_be_used("cpu", "bfloat16"), reason="this processor has no bfloat16 that oneDNN can use"
)


def assert_rounded(found, expected, terms):
    """Hold ``found``, bfloat16, to ``expected``, float64; ``terms`` are the sums of the absolute values of the terms.

    bfloat16 has a unit roundoff of 2**-8: a sum is rounded once before the bias is added, on some processors, and once
    after it.
    """
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= 2 * 2**-8 * terms).all()


def absolute(layer):
    """Return a layer in float64 with the absolute values of weight and bias."""
    layer = copy.deepcopy(layer).double().requires_grad_(False)
    for each in layer.parameters():
        each.abs_()
    return layer


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(1, 96), (16, 96), (3, 50, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_layer_is_the_same(shape, bias):
    linear = torch.nn.Linear(96, 200, bias=bias).bfloat16()
    packed = onednn.PackedLinear(linear)
    rows = torch.randn(shape)
    with torch.inference_mode():
        found, inputs = packed(rows), rows.bfloat16().double()
        expected = copy.deepcopy(linear).double()(inputs)
        assert_rounded(found, expected, absolute(linear)(inputs.abs()))
    assert torch.equal(packed.weight, linear.weight)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "groups", "padding"),
    [(32, 1, 1, 1, 0), (24, 3, 2, 24, 0), (24, 5, 1, 24, 2), (24, 3, 2, 24, (0, 1, 0, 1))],
)
def test_a_convolution_with_its_activation_is_the_same(channels, kernel, stride, groups, padding):
    symmetric = padding if isinstance(padding, int) else 0
    convolution = torch.nn.Conv2d(24 if groups > 1 else channels, channels, kernel, stride, symmetric, groups=groups)
    convolution.static_padding = torch.nn.Identity() if symmetric == padding else torch.nn.ZeroPad2d(padding)
    convolution = convolution.bfloat16().to(memory_format=torch.channels_last)
    maps = torch.randn(4, convolution.in_channels, 28, 28).contiguous(memory_format=torch.channels_last) * 6
    with torch.inference_mode():
        found, inputs = onednn.ConvReLU6(convolution)(maps), convolution.static_padding(maps.bfloat16().double())
        expected = torch.nn.functional.relu6(copy.deepcopy(convolution).double()(inputs))
        assert_rounded(found, expected, absolute(convolution)(inputs.abs()))
    assert 0 < (found == 6).float().mean() < 0.5  # so there was something to cut off


def test_every_linear_layer_is_packed_but_those_used_otherwise():
    attention = torch.nn.MultiheadAttention(8, 2)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.Linear(8, 8)), attention)
    onednn.pack(model)
    assert isinstance(model[0], onednn.PackedLinear)
    assert isinstance(model[1][0], onednn.PackedLinear)
    assert isinstance(attention.out_proj, torch.nn.Linear)  # whose weight the attention takes by itself


@pytest.mark.parametrize(("device", "dtype"), [("cuda", "bfloat16"), ("cpu", "float32")])
def test_only_for_bfloat16_on_the_cpu(device, dtype):
    assert not onednn.can_be_used(device, dtype)


def test_a_build_of_pytorch_without_these_operators_does_without(monkeypatch):
    class Nothing:
        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    onednn._works.cache_clear()
    try:
        assert not onednn.can_be_used("cpu", "bfloat16")
    finally:
        onednn._works.cache_clear()
