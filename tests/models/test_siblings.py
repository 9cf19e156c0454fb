"""What the siblings change, each pinned by a number: scaled branches, zero gamma, small weights, and the L2 penalty."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rir_kernels
from models import siblings
from models.rir import RiR
from rir_kernels import reference

CNN = {"inner_shortcut": False, "outer_shortcut": False}
RESNET = {"inner_shortcut": False}
RESNET_INIT = {"outer_shortcut": False}
SMALL = {"width": (8, 12), "depth": (2, 1), "dtype": torch.float64}


def built(**options):
    torch.manual_seed(0)
    return RiR(3, **(SMALL | options))


def test_the_constants():
    assert siblings.branch_scale("uniform", 3, 16) == 0.25
    assert siblings.branch_scale("decreasing", 1, 16) == 1 / math.log(2)
    assert siblings.branch_scale("decreasing", 4, 16) == 1 / (2 * math.log(5))


@pytest.mark.parametrize("layers", [reference, rir_kernels], ids=["reference", "package"])
@pytest.mark.parametrize("kind", ["uniform", "decreasing"])
def test_where_branches_are_scaled(layers, kind):
    def expected(count):
        if kind == "uniform":
            return [count**-0.5] * count
        return [1 / (index**0.5 * math.log(index + 1)) for index in range(1, count + 1)]

    def scales(**options):
        blocks = RiR(layers=layers, device="meta", branch_scaling=kind, **options).blocks()
        return [[layer.branch_scale for layer in block.layers] for block in blocks]

    # the last rounding of a power and of a root may differ
    assert [last for _, last in scales(**RESNET)] == pytest.approx(expected(8), rel=1e-15)
    assert [first for first, _ in scales(**RESNET)] == [1.0] * 8  # no shortcut joins there
    for options in ({}, RESNET_INIT):
        assert [scale for block in scales(**options) for scale in block] == pytest.approx(expected(16), rel=1e-15)


def test_the_scaled_resnet_block_is_its_formula():
    """y = relu(lambda * bn(conv) + shortcut)."""
    block = built(**RESNET, branch_scaling="decreasing").stages[0][1].eval()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    first, last = block.layers
    branch = last.bn(last.conv(F.relu(first.bn(first.conv(x)))))
    # the fp64 rounding of three sums of 72 products
    expected = F.relu(branch / (math.sqrt(2) * math.log(3)) + x)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_the_scaled_rir_block_is_its_formula():
    """r' = relu(bn(lambda * conv + inner + outer)), and every layer has its lambda: shortcuts have none."""
    block = built(branch_scaling="decreasing").stages[0][1].eval()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    y = x
    for index, layer in enumerate(block.layers, 3):  # the layers of the block before are 1 and 2
        z = F.conv2d(y, layer.weight, padding=1) / (math.sqrt(index) * math.log(index + 1))
        shortcut = y[:, :4] + (x[:, :4] if index == 4 else 0.0)
        y = F.relu(layer.bn(torch.cat([z[:, :4] + shortcut, z[:, 4:]], dim=1)))
    # the fp64 rounding of three sums of 72 products
    torch.testing.assert_close(block(x), y, rtol=1e-12, atol=1e-12)


def test_zero_gamma_leaves_the_shortcuts():
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    model = built(**RESNET, zero_init_gamma=True)
    stem = model.stem(x)
    assert torch.equal(model.stages[0](stem), stem)  # relu(0 + what a ReLU made)
    padded = F.pad(stem[:, :, ::2, ::2], (0, 0, 0, 0, 0, 4))
    assert torch.equal(model.stages(stem), padded)
    others = [layer.bn.weight for block in model.blocks() for layer in block.layers[:-1]]
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in others)


@pytest.mark.parametrize("layers", [reference, rir_kernels], ids=["reference", "package"])
@pytest.mark.parametrize("variant", [CNN, RESNET, RESNET_INIT, {}], ids=str)
def test_init_scale_multiplies_the_blocks_convolutions(layers, variant):
    shortcut = {} if variant is CNN else {"shortcut": "projection"}
    plain = dict(built(**variant, **shortcut, layers=layers).named_parameters())
    scaled = dict(built(**variant, **shortcut, layers=layers, init_scale=0.25).named_parameters())
    branches = [name for name in plain if ".layers." in name and plain[name].dim() == 4 and "projection" not in name]
    assert len(branches) == (24 if layers is reference and "inner_shortcut" not in variant else 6)
    for name, weight in plain.items():
        factor = 0.25 if name in branches else 1.0  # a power of two: exact
        assert torch.equal(scaled[name], factor * weight), name


@pytest.mark.parametrize("layers_per_block", [1, 2, 3])
@pytest.mark.parametrize("variant", [CNN, RESNET, RESNET_INIT, {}], ids=str)
def test_shortcut_depth(variant, layers_per_block):
    model = built(**variant, layers_per_block=layers_per_block)
    assert [len(block.layers) for block in model.blocks()] == [layers_per_block] * 3
    assert [layer.stride if "inner_shortcut" not in variant else layer.conv.stride[0] for layer in
            model.stages[1][0].layers] == [2] + [1] * (layers_per_block - 1)  # fmt: skip
    assert model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CNN | {"branch_scaling": "uniform"}, "no branches to scale"),
        ({"branch_scaling": "stable"}, "branch_scaling must be one of None, 'uniform', 'decreasing', got 'stable'"),
        (CNN | {"zero_init_gamma": True}, "a CNN has no shortcuts"),
        (RESNET_INIT | {"zero_init_gamma": True}, "ResNet Init: its norms see the sum.* init_scale"),
        ({"zero_init_gamma": True}, "RiR: its norms see the sum.* init_scale"),
        ({"init_scale": 0.0}, "init_scale must be a positive number, got 0.0"),
        ({"init_scale": math.nan}, "init_scale must be a positive number, got nan"),
        ({"init_scale": math.inf}, "init_scale must be a positive number, got inf"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RiR(**options)


@pytest.mark.parametrize("channels", [(6, 6, 1), (6, 10, 2)], ids=["same shape", "stride 2, wider"])
def test_weight_decay_is_the_papers(channels):
    """ResNet Init has the identity in the weight and decays W - I; here it is an add, and plain L2 on W is the same."""
    inputs, outputs, stride = channels
    torch.manual_seed(0)
    decay, rate = 0.1, 0.5
    layer = rir_kernels.RiRLayer(inputs, outputs, stride=stride, dtype=torch.float64)
    identity = torch.zeros_like(layer.weight)
    for channel in range(inputs // 2):  # from the residual stream to the residual stream, at the centre tap
        identity[channel, channel, 1, 1] = 1.0
    full = nn.Parameter(layer.weight.detach() + identity)
    x, target = torch.randn(4, inputs, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])

    def folded(x):
        z = F.conv2d(x, full, stride=stride, padding=1)
        return F.relu(F.batch_norm(z, None, None, layer.bn.weight, layer.bn.bias, training=True))

    def loss(y):
        return F.cross_entropy(y.mean((2, 3)), target)

    ours = torch.optim.SGD([layer.weight], lr=rate, momentum=0.9, weight_decay=decay)
    theirs = torch.optim.SGD([full], lr=rate, momentum=0.9)
    for _ in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        loss(layer(x)).backward()
        (loss(folded(x)) + decay / 2 * (full - identity).square().sum()).backward()
        # fp64: the identity's ones are rounded into the sums of one, and not of the other
        torch.testing.assert_close(layer.weight.grad + decay * layer.weight, full.grad, rtol=1e-12, atol=1e-12)
        ours.step()
        theirs.step()
    torch.testing.assert_close(layer.weight + identity, full, rtol=1e-12, atol=1e-12)
