"""RiRLayer, RiRBlock and ConvBNAct on plain PyTorch against the formula and the reference, all in fp64."""

import pytest
import torch
from torch import nn

import rir_kernels as rir
from rir_kernels import reference
from tests.support.helpers import assert_same_results, conv_formula, double_precision, formula, scrambled  # noqa: F401

# outputs and gradients of order one to a hundred, through up to three norms: rounding stays below 1e-11, and a mistake
# is above 1e-3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
GEOMETRIES = pytest.mark.parametrize(
    ("in_channels", "out_channels", "stride", "kernel_size", "size"),
    [(6, 6, 1, 3, (5, 7)), (4, 10, 2, 3, (7, 5)), (9, 5, 2, 1, (6, 6)), (5, 1, 1, 5, (4, 3)), (1, 5, 3, 3, (7, 8))],
)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def shortcut_formula(layer, x):
    """What joins the sum of a layer: (N, C, H', W')."""
    r = x[:, : layer.in_residual]
    if layer.projection is not None:
        return conv_formula(r, layer.projection.weight, stride=layer.stride)
    return r[:, : layer.out_residual, :: layer.stride, :: layer.stride]


@pytest.mark.parametrize("fraction", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("shortcut", ["pad", "projection", "none"])
@GEOMETRIES
@modes
def test_layer(fraction, shortcut, in_channels, out_channels, stride, kernel_size, size, training):
    layer = scrambled(
        rir.RiRLayer(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            residual_fraction=fraction,
            shortcut=shortcut,
            branch_scale=0.7,
            eps=1e-3,
            momentum=0.3,
        )
    ).train(training)
    x = torch.randn(3, in_channels, *size)
    assert_same_results(layer, layer.to_reference(), x, **CLOSE)
    with rir.use_impl("reference"):
        assert_same_results(layer, layer.to_reference(), x, **CLOSE)

    mean, var = layer.bn.running_mean.clone(), layer.bn.running_var.clone()
    expected = formula(
        x, layer.weight, layer.bn.weight, layer.bn.bias, mean, var,
        residual=None if shortcut == "none" else shortcut_formula(layer, x),
        branch_scale=0.7, stride=stride, padding=kernel_size // 2, training=training, momentum=0.3, eps=1e-3,
    )  # fmt: skip
    y = layer(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(layer.bn.running_mean, mean, **CLOSE)
    torch.testing.assert_close(layer.bn.running_var, var, **CLOSE)

    c = layer.in_residual
    r, t = layer.eval()(x[:, :c] if c else None, x[:, c:] if c < in_channels else None)
    assert (r.shape[1], t.shape[1]) == (layer.out_residual, out_channels - layer.out_residual)
    assert torch.equal(torch.cat([r, t], 1), layer(x))


@pytest.mark.parametrize("outer_shortcut", ["pre_norm", "post_act", "none"])
@pytest.mark.parametrize("outer_streams", ["residual", "both"])
@pytest.mark.parametrize("shortcut", ["pad", "projection", "none"])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "stride", "fraction", "num_layers", "training"),
    [
        (6, 6, 1, 0.5, 2, True), (4, 8, 2, 0.25, 2, False), (8, 4, 1, 0.5, 3, True), (4, 6, 2, 0, 2, True),
        (4, 6, 2, 1, 1, True), (1, 4, 2, 0.5, 2, True),
    ],
)  # fmt: skip
def test_block(
    outer_shortcut, outer_streams, shortcut, in_channels, out_channels, stride, fraction, num_layers, training
):
    block = scrambled(
        rir.RiRBlock(
            in_channels,
            out_channels,
            num_layers=num_layers,
            stride=stride,
            outer_shortcut=outer_shortcut,
            outer_streams=outer_streams,
            residual_fraction=fraction,
            shortcut=shortcut,
            branch_scale=0.6,
            eps=1e-3,
            momentum=None,
        )
    ).train(training)
    x = torch.randn(3, in_channels, 5, 7)
    assert_same_results(block, block.to_reference(), x, **CLOSE)
    block.eval()
    c = block.in_residual
    r, t = block(x[:, :c] if c else None, x[:, c:] if c < in_channels else None)
    assert (r.shape[1], t.shape[1]) == (block.out_residual, out_channels - block.out_residual)
    assert torch.equal(torch.cat([r, t], 1), block(x))


@pytest.mark.parametrize("residual_at", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("widths", [(), (2,), (6, 3)])
@modes
def test_unit(residual_at, activation, widths, training):
    options = {
        "stride": (2, 1), "groups": 2, "bias": True, "residual_at": residual_at, "branch_scale": 0.4,
        "activation": activation, "eps": 1e-3, "momentum": 0.2,
    }  # fmt: skip
    unit, ref = scrambled(rir.ConvBNAct(4, 6, 3, **options)), reference.ConvBNAct(4, 6, 3, **options)
    ref.load_state_dict(unit.state_dict())
    residuals = [torch.randn(3, width, 4, 5) for width in widths]

    class Call(nn.Module):  # the residuals as inputs of their own, so that their gradients are compared as well
        def __init__(self, unit):
            super().__init__()
            self.unit = unit

        def forward(self, x, *residuals):
            return self.unit(x, residuals[0] if len(residuals) == 1 else residuals or None)

    assert_same_results(
        Call(unit).train(training), Call(ref).train(training), torch.randn(3, 4, 7, 5), *residuals, **CLOSE
    )


@pytest.mark.parametrize(("kernel_size", "padding"), [(3, None), ((5, 3), None), (4, None), (3, 0)])
def test_unit_starts_as_torchs_own(kernel_size, padding):
    """Same seed, same names, same numbers, same size of output as Conv2d and BatchNorm2d."""
    torch.manual_seed(1)
    unit = rir.ConvBNAct(4, 6, kernel_size, stride=2, padding=padding)
    torch.manual_seed(1)
    expected = reference.ConvBNAct(4, 6, kernel_size, stride=2, padding=padding)  # compared with torch's by its tests
    ours, theirs = unit.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert unit(torch.randn(2, 4, 7, 7)).shape == expected(torch.randn(2, 4, 7, 7)).shape


# the shortcut without parameters: exact


def only_the_shortcut(module):
    """Weights zero, and a norm that is the identity to the last bit: 2 * z / sqrt(3 + 1)."""
    for m in module.modules():
        if isinstance(m, rir.RiRLayer):
            nn.init.zeros_(m.weight)
            m.bn.eps = 1.0
            nn.init.constant_(m.bn.running_var, 3.0)
            nn.init.constant_(m.bn.weight, 2.0)
    return module.eval()


@pytest.mark.parametrize(("in_channels", "out_channels"), [(4, 10), (10, 4), (4, 4)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pad_shortcut_is_exact(in_channels, out_channels, stride):
    layer = only_the_shortcut(rir.RiRLayer(in_channels, out_channels, stride=stride, dtype=torch.float32))
    x = torch.rand(2, in_channels, 7, 6).float()  # positive: the ReLU lets everything through
    y, kept = layer(x), min(in_channels, out_channels) // 2
    assert torch.equal(y[:, :kept], x[:, :kept, ::stride, ::stride])
    assert torch.equal(y[:, kept:], torch.zeros_like(y[:, kept:]))


@pytest.mark.parametrize("outer_shortcut", ["pre_norm", "post_act"])
def test_outer_pad_shortcut_is_exact(outer_shortcut):
    block = only_the_shortcut(
        rir.RiRBlock(4, 6, stride=2, outer_shortcut=outer_shortcut, outer_streams="both", shortcut="none")
    )
    x = torch.rand(2, 4, 7, 5)
    expected = torch.zeros(2, 6, 4, 3)
    expected[:, 0:2] = x[:, :2, ::2, ::2]
    expected[:, 3:5] = x[:, 2:, ::2, ::2]
    assert torch.equal(block(x), expected)
