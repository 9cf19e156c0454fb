"""The 18-layer network: its parameter counts are the literature's, its numbers those of an implementation by others."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import rir_kernels
from models.rir import RiR
from rir_kernels import reference

THIN = {"width": (16, 32, 64), "layers": reference}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 9_469_940),
        ({"outer_shortcut": "none"}, 9_469_940),  # ResNet Init
        ({"shortcut": "none", "outer_streams": "both", "residual_fraction": 0.25}, 9_469_940),
        ({"shortcut": "projection", "outer_shortcut": "none"}, 9_492_980),  # pytorchcv's rir_cifar10
        ({"shortcut": "projection", "outer_shortcut": "none", "num_classes": 100}, 9_527_720),  # its rir_cifar100
        ({"shortcut": "projection"}, 9_492_980 + 48 * 96 + 96 * 192),  # the outer ones as well
    ],
)
@pytest.mark.parametrize("layers", [reference, rir_kernels], ids=["reference", "package"])
def test_parameter_count_of_the_wide_network(layers, options, expected):
    assert count(RiR(layers=layers, device="meta", **options)) == expected


def test_parameter_count_of_the_thin_network():
    stem, head = 27 * 16 + 32, 64 * 10 + 20
    stages = [(16, 16, 4), (16, 32, 6), (32, 64, 6)]  # inputs, outputs, layers
    convs = sum(9 * (i * o + (n - 1) * o * o) + 2 * n * o for i, o, n in stages)
    assert count(RiR(**THIN)) == stem + convs + head


def test_names():
    names = list(RiR(**THIN, shortcut="projection").state_dict())
    assert names[0] == "stem.conv.weight"
    assert "stages.0.1.layers.1.conv_tr.weight" in names
    assert "stages.2.0.layers.0.projection.weight" in names
    assert "stages.2.0.projection.weight" in names
    assert "stages.2.2.layers.1.bn_t.running_var" in names
    assert "head.bn.bias" in names
    assert "head.conv.bias" not in names
    assert not any(name.startswith("stages.0.0.projection") for name in names)  # no shape changes there


def pytorchcv_twin():
    """A thin network of pytorchcv's in fp64, and ours with its weights."""
    rir_cifar = pytest.importorskip("pytorchcv.models.rir_cifar")
    torch.manual_seed(0)
    theirs = rir_cifar.CIFARRiR(channels=[[8] * 4, [16] * 6, [32] * 6], init_block_channels=8, final_block_channels=64)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    theirs = theirs.double()
    ours = RiR(**THIN, shortcut="projection", outer_shortcut="none", dtype=torch.float64)

    def joined(first, second):
        return {k: torch.cat([v, second[k]]) if v.dim() else v for k, v in first.items()}  # num_batches_tracked: no dim

    init, final = theirs.features.init_block, theirs.output.final_conv
    ours.stem.conv.load_state_dict(joined(init.res_conv.conv.state_dict(), init.trans_conv.conv.state_dict()))
    ours.stem.bn.load_state_dict(joined(init.res_conv.bn.state_dict(), init.trans_conv.bn.state_dict()))
    ours.head.conv.load_state_dict(final.conv.state_dict())
    ours.head.bn.load_state_dict(final.bn.state_dict())

    layers = [layer for stage in ours.stages for block in stage for layer in block.layers]
    stages = (theirs.features.stage1, theirs.features.stage2, theirs.features.stage3)
    for layer, unit in zip(layers, [unit for stage in stages for unit in stage.children()], strict=True):
        layer.conv_rr.load_state_dict(unit.res_pass_conv.state_dict())
        layer.conv_rt.load_state_dict(unit.res_cross_conv.state_dict())
        layer.conv_tr.load_state_dict(unit.trans_cross_conv.state_dict())
        layer.conv_tt.load_state_dict(unit.trans_pass_conv.state_dict())
        layer.bn_r.load_state_dict(unit.res_postactiv.bn.state_dict())
        layer.bn_t.load_state_dict(unit.trans_postactiv.bn.state_dict())
        if unit.resize_identity:
            layer.projection.load_state_dict(unit.identity_conv.state_dict())
    return ours, theirs


@pytest.mark.parametrize("size", [(32, 32), (33, 29)])
def test_the_network_is_pytorchcvs(size):
    ours, theirs = pytorchcv_twin()
    theirs.output.final_pool = torch.nn.AdaptiveAvgPool2d(1)  # theirs pools 8x8 windows: the same at 32x32 alone
    x = torch.randn(4, 3, *size, dtype=torch.float64)
    for mode in (True, False):  # training first, so that eval sees running statistics of a step
        expected = theirs.train(mode)(x)
        # fp64 through 18 norms: each may enlarge a rounding error of 1e-16 a few times; a wrong wire is above 1e-3
        torch.testing.assert_close(ours.train(mode)(x), expected, rtol=1e-8, atol=1e-8)


def test_the_outer_shortcut_is_wired_by_default():
    """Block by block from the layers: the default joins the residual stream before the last norm."""
    torch.manual_seed(0)
    model = RiR(**THIN, depth=(1, 1, 0), dtype=torch.float64).eval()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    y = F.relu(model.stem.bn(model.stem.conv(x)))
    for block, stride, pad in ((model.stages[0][0], 1, 0), (model.stages[1][0], 2, 8)):
        r = F.pad(y[:, : y.shape[1] // 2, ::stride, ::stride], (0, 0, 0, 0, 0, pad))
        y = block.layers[1](block.layers[0](y), outer=r)
    y = model.head.bn(model.head.conv(y)).mean((2, 3))
    # the same operations in the same order, apart from the pooling
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


def test_every_parameter_learns():
    """One step at a small rate lowers the loss as far as the gradient promises."""
    torch.manual_seed(0)
    model = RiR(**THIN, depth=(1, 1, 1), dtype=torch.float64, shortcut="projection", outer_streams="both")
    x, target = torch.randn(8, 3, 9, 9, dtype=torch.float64), torch.arange(8)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    rate = 1e-6
    promised = rate * sum((g**2).sum() for g in gradients)
    with torch.no_grad():
        for p in model.parameters():
            p -= rate * p.grad
        gained = loss - F.cross_entropy(model(x), target)
    # the second-order term is of the order of the rate, times a curvature that can be large where a variance is small
    assert gained.item() == pytest.approx(promised.item(), rel=1e-2)


def test_impl_and_factory_reach_every_unit():
    seen = []

    def recorded(cls):
        def build(*args, impl, **kwargs):
            seen.append((cls.__name__, impl, kwargs["dtype"]))
            return cls(*args, **kwargs)

        return build

    layers = SimpleNamespace(RiRBlock=recorded(reference.RiRBlock), ConvBNAct=recorded(reference.ConvBNAct))
    RiR(width=(16, 32, 64), layers=layers, impl="torch", dtype=torch.float64)
    assert seen == [(name, "torch", torch.float64) for name in ["ConvBNAct", *["RiRBlock"] * 8, "ConvBNAct"]]
    with pytest.raises(TypeError, match="impl"):
        RiR(**THIN, impl="torch")  # the reference has no other implementations


def test_stem_and_head_start_from_he_normal():
    torch.manual_seed(0)
    model = RiR(layers=reference, depth=(0, 0, 0), num_classes=100)
    for weight, fan_in in ((model.stem.conv.weight, 27), (model.head.conv.weight, 96)):
        # the sample variance of n normals has the relative deviation sqrt(2 / n); 5 of them, and the seed is fixed
        assert weight.var().item() == pytest.approx(2 / fan_in, rel=5 * (2 / weight.numel()) ** 0.5)


def test_width_and_depth_must_agree():
    with pytest.raises(ValueError, match="one entry per stage"):
        RiR(width=(16, 32), layers=reference)
