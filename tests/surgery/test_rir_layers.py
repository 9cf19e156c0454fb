"""fuse_ fuses generalized residual layers: reference.RiRLayer and pytorchcv's RiRUnit."""

import copy
import sys

import pytest
import torch
from torch import nn

from rir_kernels import reference
from rir_kernels.surgery import fuse_, unfuse_
from tests.support.surgery_helpers import (
    ANY_CHANGES,
    CLOSE,
    CONV_CHANGES,
    NORM_CHANGES,
    RELU_CHANGES,
    assert_change_is_noticed,
    assert_same,
    assert_same_after,
    change_both,
    double_output,
    fused_calls,
    pair_of,
    randn,
    settle,
    unchanged,
)

rir_cifar = pytest.importorskip("pytorchcv.models.rir_cifar")


def unit(stride=1, out_channels=4):
    model = settle(rir_cifar.RiRUnit(4, out_channels, stride))
    for postactiv in (model.res_postactiv, model.trans_postactiv):
        postactiv.activ.inplace = False  # torch refuses a backward hook before an activation in place
    return model


def layer(**options):
    return settle(reference.RiRLayer(8, options.pop("out_channels", 8), **options))


def pair(module):
    return pair_of(module, ["conv_add_bn_act"])


R, T = randn(3, 4, 6, 6, seed=1), randn(3, 4, 6, 6, seed=2)
BOTH = {"unit": unit, "layer": layer}
# the same roles in both: a residual-to-transient convolution, the norms of r and t
CONV = {"unit": "res_cross_conv", "layer": "conv_rt"}
NORMS = {"unit": ("res_postactiv.bn", "trans_postactiv.bn"), "layer": ("bn_r", "bn_t")}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("stride", "out_channels"), [(1, 4), (2, 8), (1, 6), (2, 4)])
def test_unit(stride, out_channels, training):
    fused, original = pair(unit(stride, out_channels).train(training))
    for _ in range(2):  # the second step shows what the first one left in the buffers
        assert_same(fused, original, R, T)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "out_channels": 12},
        {"stride": 2, "out_channels": 5, "shortcut": "projection"},
        {"shortcut": "projection"},  # the identity: the shape does not change
        {"shortcut": "none", "kernel_size": 1},
        {"residual_fraction": 0.25, "branch_scale": 0.3, "kernel_size": 5},
        {"residual_fraction": 0, "out_channels": 6},
        {"residual_fraction": 1, "out_channels": 6},
        {"residual_fraction": 1, "eps": 0.1, "momentum": None},
    ],
    ids=str,
)
def test_layer(options, training):
    fused, original = pair(layer(**options).train(training))
    x = randn(3, 8, 6, 6)
    for _ in range(2):
        assert_same(fused, original, x)
    r, t = x[:, : original.in_residual], x[:, original.in_residual :]
    size = 6 // original.stride
    for channels in (0, 1, original.out_channels):
        assert_same(fused, original, r, t, outer=randn(3, channels, size, size, seed=3))
    if t.shape[1] == 0:
        assert_same(fused, original, r, None)


def test_adjacent_streams_and_separate_ones_agree():
    fused, original = pair(unit())
    packed = torch.cat([R, T], dim=1)
    with fused_calls(2):
        assert_same(fused, original, R, T)
        torch.testing.assert_close(fused(packed[:, :4], packed[:, 4:]), original(R, T), **CLOSE)


DISAGREEMENTS = {
    "mode": lambda r, t: t.eval(),
    "eps": lambda r, t: setattr(r, "eps", 0.5),
    "momentum": lambda r, t: setattr(t, "momentum", 0.7),
    "cumulative": lambda r, t: setattr(t, "momentum", None),
    "tracking": lambda r, t: setattr(t, "track_running_stats", False),
    "affine": lambda r, t: setattr(t, "weight", None),
    "buffers": lambda r, t: (setattr(r, "running_mean", None), setattr(r, "running_var", None)),
}
OTHER_CONVOLUTIONS = {
    "groups": {"groups": 2},
    "dilation": {"dilation": 2, "padding": 2},
    "padding_mode": {"padding_mode": "circular"},
    "kernel size": {"kernel_size": 5, "padding": 2},
    "bias": {"bias": True},
}


def norms(model, kind):
    return [model.get_submodule(name) for name in NORMS[kind]]


def other_convolution(model, kind, options):
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1, "bias": False} | options
    setattr(model, CONV[kind], nn.Conv2d(4, 4, **options).double())


def _changes():
    """(kind, name, change) of everything that keeps a layer from being fused."""
    for kind in BOTH:
        parts = [(CONV[kind], CONV_CHANGES), (NORMS[kind][1], NORM_CHANGES)]
        if kind == "unit":
            parts += [("res_postactiv.activ", RELU_CHANGES), ("trans_postactiv", ANY_CHANGES)]
        for part, changes in parts:
            for name, change in changes.items():
                yield kind, f"{part}: {name}", lambda m, part=part, change=change: change(m.get_submodule(part))
        for name, change in DISAGREEMENTS.items():
            yield kind, f"norms: {name}", lambda m, kind=kind, change=change: change(*norms(m, kind))
        for name, options in OTHER_CONVOLUTIONS.items():
            yield kind, name, lambda m, kind=kind, options=options: other_convolution(m, kind, options)


@pytest.mark.parametrize(("kind", "name", "change"), list(_changes()))
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_changed(kind, name, change, before):
    assert_change_is_noticed(change, BOTH[kind](), before, R, T)  # a stream's norm and ReLU may still be fused


KEPT = {
    "frozen by eval": lambda m, norms: [norm.eval() for norm in norms],
    "no gradients": lambda m, norms: [p.requires_grad_(False) for p in m.parameters()],
    "some gradients": lambda m, norms: [p.requires_grad_(False) for p in [*m.parameters()][::2]],
    "momentum": lambda m, norms: [setattr(norm, "momentum", 0.9) for norm in norms],
    "cumulative": lambda m, norms: [setattr(norm, "momentum", None) for norm in norms],
    "eps": lambda m, norms: [setattr(norm, "eps", 0.5) for norm in norms],
    "no tracking": lambda m, norms: [setattr(norm, "track_running_stats", False) for norm in norms],
    "no affine": lambda m, norms: [setattr(norm, name, None) for norm in norms for name in ("weight", "bias")],
    "no statistics": lambda m, norms: [setattr(n, f"running_{name}", None) for n in norms for name in ("mean", "var")],
    "weights in place": lambda m, norms: [p.data.mul_(1.5) for p in m.parameters()],
    "new parameter": lambda m, norms: setattr(norms[0], "weight", nn.Parameter(norms[0].weight.detach() * 2)),
    "reset norm": lambda m, norms: norms[0].reset_parameters(),
    "counters": lambda m, norms: norms[1].num_batches_tracked.fill_(7),
}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("change", KEPT)
@pytest.mark.parametrize("training", [True, False])
def test_changes_that_the_fused_layer_follows(kind, change, training):
    fused, original = pair(BOTH[kind]().train(training))
    change_both(lambda m: KEPT[change](m, norms(m, kind)), fused, original)
    for _ in range(2):
        assert_same(fused, original, R, T)


@pytest.mark.parametrize("kind", BOTH)
def test_cumulative_average_needs_equal_counts(kind):
    def change(model):
        r, t = norms(model, kind)
        r.momentum = t.momentum = None
        t.num_batches_tracked.fill_(3)

    assert_same_after(change, *pair(BOTH[kind]()), R, T, exact=True, calls=0)


def test_one_norm_for_both_streams_is_not_fused():
    def change(model):
        model.trans_postactiv.bn = model.res_postactiv.bn

    fused, original = pair(unit())
    assert_same_after(change, fused, original, R, T, exact=True, calls=0)
    assert "share one norm" in fuse_(unfuse_(fused)).skipped[0].reason


@pytest.mark.parametrize("stride", [1, 2])
def test_the_projection_keeps_its_hooks(stride):
    assert_same_after(lambda m: double_output(m.identity_conv), *pair(unit(stride, 8)), R, T)


def test_another_projection_is_not_fused():
    def change(model):
        model.identity_conv = nn.Sequential(model.identity_conv, nn.BatchNorm2d(8))

    assert_same_after(change, *pair(unit(2, 8)), R, T, exact=True, calls=0)


def test_streams_that_broadcast_are_not_fused():
    assert_same(*pair(unit()), R, T[:1], exact=True, calls=0)


def _conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options).double()


@pytest.mark.parametrize("kind", BOTH)
def test_channels_that_fit_only_in_sum_raise_as_unfused(kind):
    """Packed streams would hide the error."""
    for model in pair(BOTH[kind]()):
        for inputs in ((R[:, :3], torch.cat([R[:, 3:], T], dim=1)), (R.float(), T), (R[0], T[0])):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                model(*inputs)
    for model in pair(BOTH[kind]()):
        for name, channels in zip(NORMS[kind], (3, 5), strict=True):
            model.get_submodule(name).__init__(channels, dtype=torch.float64)
        with pytest.raises(RuntimeError):
            model(R, T)


def test_convolutions_that_fit_only_in_sum_raise_as_unfused():
    for model in pair(layer()):
        model.conv_rr, model.conv_rt, model.conv_tr, model.conv_tt = _conv(3, 4), _conv(3, 4), _conv(5, 4), _conv(5, 4)
        with pytest.raises(RuntimeError):
            model(R, T)
    for stride, channels in ((2, 4), (1, 6)):
        for model in pair(unit()):
            for name in ("res_pass_conv", "res_cross_conv", "trans_cross_conv", "trans_pass_conv"):
                setattr(model, name, _conv(4, channels, stride=stride))
            for postactiv in (model.res_postactiv, model.trans_postactiv):
                postactiv.bn = nn.BatchNorm2d(channels).double()
            with pytest.raises(RuntimeError):  # the identity has another shape
                model(R, T)


@pytest.mark.parametrize("x", [randn(3, 7, 6, 6), randn(8, 6, 6)], ids=["channels", "dimensions"])
def test_packed_input_of_another_shape(x):
    for model in pair(layer(stride=2, shortcut="projection")):
        with pytest.raises(ValueError, match=r"x must have the shape \(N, 8, H, W\)"):
            model(x)


def test_a_call_that_raises_changes_nothing():
    fused = unit()
    fuse_(fused, impl="triton")  # there are no fp64 kernels
    with unchanged(fused), pytest.raises((TypeError, ImportError)):
        fused(R, T)


def test_runs_in_the_requested_implementation():
    fused, original = pair_of(unit(2, 8).float(), 1, impl="reference")
    with fused_calls(1) as calls:
        found = fused(R.float(), T.float())
    assert [call.impl for call in calls] == ["reference"]
    # fp32 at its default tolerance: a few rounding errors
    torch.testing.assert_close(found, original(R.float(), T.float()))


def test_subclasses_are_refused():
    class Wider(rir_cifar.RiRUnit):
        def forward(self, x_res, x_trans):
            return super().forward(2 * x_res, x_trans)

    class Other(reference.RiRLayer):
        pass

    report = fuse_(nn.ModuleList([Wider(4, 4, 1), Other(8, 8)]), patterns="conv_add_bn_act")
    assert not report.replaced
    refused = [item for item in report.skipped if "subclass" in item.reason]
    assert [(item.name, item.within) for item in refused[:2]] == [("0", None), ("1", None)]
    # their convolutions and norms; two of the norms have a ReLU after them, which another pattern fuses
    assert [item.within for item in refused[2:]] == ["0"] * 4 + ["1"] * 6


def test_pytorchcv_is_not_imported(monkeypatch):
    model = unit()
    monkeypatch.delitem(sys.modules, "pytorchcv.models.rir_cifar")
    assert "conv_add_bn_act" not in [item.pattern for item in fuse_(model).replaced]
    assert "pytorchcv.models.rir_cifar" not in sys.modules


class TestRirCifar10:
    """The real network at batch 2 and full image size: slow enough to be built once."""

    @pytest.fixture(scope="class")
    @classmethod
    def models(cls):
        torch.manual_seed(0)
        original = rir_cifar.rir_cifar10()
        fused = copy.deepcopy(original)
        parameters, keys = list(fused.parameters()), list(fused.state_dict())
        report = fuse_(fused)
        found = [(item.pattern, item.kind) for item in report.replaced]
        assert found == [("conv_bn_act", "ConvBlock")] * 2 + [("conv_add_bn_act", "RiRUnit")] * 16 + [
            ("conv_bn", "ConvBlock")
        ]
        # convolutions of the identity, and the last one, which computes the logits
        assert {(item.kind, item.within) for item in report.skipped} == {("Conv2d", None)}
        assert report.coverage.convolutions == report.coverage.fused + len(report.skipped)
        assert list(fused.state_dict()) == keys
        assert all(new is old for new, old in zip(fused.parameters(), parameters, strict=True))
        assert sum(p.numel() for p in fused.parameters()) == 9_492_980
        return fused, original

    @pytest.mark.parametrize("training", [True, False])
    def test_same_function(self, models, training):
        fused, original = (copy.deepcopy(model).double().train(training) for model in models)
        assert_same(fused, original, randn(2, 3, 32, 32), calls=19)

    def test_unfused_is_bit_identical(self, models):
        fused, original = (copy.deepcopy(model).eval() for model in models)
        x = randn(2, 3, 32, 32).float()
        with fused_calls(0), torch.no_grad():
            assert torch.equal(unfuse_(fused)(x), original(x))
        assert [type(m) for m in fused.modules()] == [type(m) for m in original.modules()]
