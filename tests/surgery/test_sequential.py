"""fuse_ on conv, norm and ReLU in a row within an nn.Sequential; the tolerance is surgery_helpers'."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from rir_kernels.surgery import fuse_, unfuse_
from tests.support.surgery_helpers import (
    CONV_CHANGES,
    NORM_CHANGES,
    RELU_CHANGES,
    assert_same,
    fused_calls,
    randn,
    settle,
    units_skipped,
)

X = randn(2, 4, 7, 6)


def chain(*modules):
    torch.manual_seed(0)
    return settle(nn.Sequential(*modules))


def p1(channels=4, **options):
    conv = nn.Conv2d(4, channels, options.pop("kernel_size", 3), **options)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def pair_of(module, patterns, **options):
    """(fused, original) with the same values, fused in these patterns."""
    fused = copy.deepcopy(module)
    assert [item.pattern for item in fuse_(fused, **options).replaced] == patterns
    return fused, module


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1, "bias": False},
        {"stride": 2, "padding": (1, 0)},
        {"kernel_size": 1, "channels": 6},
        {"kernel_size": (1, 3), "padding": (0, 1)},
        {"kernel_size": 7, "padding": 3},
        {"padding": "valid"},
        {"padding": "same"},
        {"padding": "same", "kernel_size": (5, 3)},
    ],
    ids=str,
)
def test_one_run(options, training):
    fused, original = pair_of(chain(*p1(**options)).train(training), ["conv_bn_act"])
    for _ in range(2):  # the second step shows what the first one left in the buffers
        assert_same(fused, original, X)


@pytest.mark.parametrize("training", [True, False])
def test_many_runs_and_what_lies_between(training):
    def tail():
        return [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]

    model = chain(
        *tail(), nn.LeakyReLU(), nn.ReLU(), *p1(padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2), *p1(padding=1), *tail()
    ).train(training)  # fmt: skip
    fused, original = pair_of(model, ["conv_bn", "conv_bn_act", "conv_bn_act", "conv_bn"])
    assert [item.parts for item in fuse_(model, dry_run=True).replaced] == [
        ("0", "1"), ("4", "5", "6"), ("9", "10", "11"), ("12", "13"),
    ]  # fmt: skip
    assert_same(fused, original, X, calls=4)


def test_named_children_and_keyword_input():
    model = settle(nn.Sequential(OrderedDict(zip(("conv", "norm", "act"), p1(), strict=True))))
    fused, original = pair_of(model, ["conv_bn_act"])
    assert fuse_(original, dry_run=True).replaced[0].parts == ("conv", "norm", "act")
    with fused_calls(1):
        torch.testing.assert_close(fused(input=X), original(input=X), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_norms(momentum, options, training):
    model = chain(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, momentum=momentum, eps=0.1, **options))
    fused, original = pair_of(model.train(training), ["conv_bn"])
    for _ in range(3):
        assert_same(fused, original, X)


CHANGES = {
    **{f"conv: {name}": (0, change) for name, change in CONV_CHANGES.items()},
    **{f"norm: {name}": (1, change) for name, change in NORM_CHANGES.items()},
    **{f"relu: {name}": (2, change) for name, change in RELU_CHANGES.items()},
    "other norm": (1, lambda norm: setattr(norm, "__class__", nn.SyncBatchNorm)),
    "other padding": (0, lambda conv: setattr(conv, "padding_mode", "reflect")),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_changed_children(name, before):
    """Changed before: refused, with the reason. Changed after: the unfused model's numbers, bit by bit."""
    index, change = CHANGES[name]
    original = chain(*p1(padding=1))
    fused = copy.deepcopy(original)
    fused[2].inplace = original[2].inplace = False  # torch refuses a backward hook before an activation in place
    if name == "other norm":  # it computes on a GPU, or as the plain norm in evaluation
        fused, original = fused.eval(), original.eval()
    change(original[index])
    if before:
        change(fused[index])
        report = fuse_(fused)
        assert not report.replaced and report.skipped[0].reason
        assert [item.name for item in units_skipped(report)] == [""]
        assert type(fused) is nn.Sequential
    else:
        assert fuse_(fused).replaced
        change(fused[index])
    assert_same(fused, original, X, exact=True, calls=0)


def test_one_changed_run_leaves_the_others_fused():
    fused, original = pair_of(chain(*p1(), *p1()), ["conv_bn_act", "conv_bn_act"])
    for model in (fused, original):
        model[4].register_forward_hook(lambda _module, _inputs, output: output.clone())
    assert_same(fused, original, X, calls=1)


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ([nn.Conv2d(4, 4, 2, padding="same"), nn.BatchNorm2d(4), nn.ReLU()], "one side"),
        ([nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU()], "ConvTranspose2d is not a Conv2d"),
        ([nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU()], "groups > 1"),
        ([nn.Conv2d(4, 4, 3, dilation=(1, 2)), nn.BatchNorm2d(4), nn.ReLU()], "dilation=(1, 2)"),
        ([nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)], "subclass of Conv2d"),
        ([nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4)], "SyncBatchNorm is not a BatchNorm2d"),
    ],
)
def test_refused(modules, reason):
    report = fuse_(model := nn.Sequential(*modules))
    assert not report.replaced and type(model) is nn.Sequential
    assert [item.name for item in units_skipped(report)] == [""]
    assert all(reason in item.reason for item in report.skipped)


@pytest.mark.parametrize(
    "modules",
    [[], [nn.Conv2d(4, 4, 1)], [nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)], [nn.BatchNorm2d(4)]],
)
def test_no_candidate(modules):
    report = fuse_(nn.Sequential(*modules))
    assert not report.replaced
    assert [item.kind for item in report.skipped] == [type(m).__name__ for m in modules if not isinstance(m, nn.ReLU)]
    assert all(item.reason.startswith("no ") for item in report.skipped)


def test_subclasses():
    class Doubling(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.Sequential):
        pass

    original = settle(Doubling(*p1(), Named(*p1())))
    fused = copy.deepcopy(original)
    assert [item.name for item in fuse_(fused).replaced] == ["", "3"]
    assert_same(fused, original, X, calls=2)


def test_a_leading_norm():
    fused, original = pair_of(
        chain(nn.BatchNorm2d(4), nn.ReLU(True), *p1(), nn.BatchNorm2d(4)), ["bn_act", "conv_bn_act"]
    )
    assert_same(fused, original, X, calls=2)


def test_patterns():
    model = chain(*p1(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    for enabled, other in (("conv_bn_act", "conv_bn"), ("conv_bn", "conv_bn_act")):
        fused = copy.deepcopy(model)
        report = fuse_(fused, patterns=[enabled])
        assert [item.pattern for item in report.replaced] == [enabled]
        assert other in report.skipped[0].reason
        assert_same(fused, copy.deepcopy(model), X, calls=1)


def test_nested_and_shared_containers():
    inner = nn.Sequential(*p1(padding=1))
    model = chain(inner, *p1(padding=1), nn.ModuleDict({"a": nn.Sequential(*p1())})["a"], inner)
    fused, original = pair_of(model, ["conv_bn_act"] * 3)
    report = fuse_(copy.deepcopy(model))
    assert [(item.name, item.also) for item in report.replaced] == [("", ()), ("0", ("5",)), ("4", ())]
    assert_same(fused, original, X, calls=4)


def test_children_may_come_and_go():
    fused, original = pair_of(chain(*p1(padding=1), *p1(padding=1)), ["conv_bn_act", "conv_bn_act"])
    for model in (fused, original):
        torch.manual_seed(0)
        del model[3]
        model.insert(1, nn.Conv2d(4, 4, 1).double())
        model.append(nn.Hardtanh())
    assert_same(fused, original, X, calls=0)
    assert "_modules has changed" in fuse_(fused).skipped[0].reason
    assert [item.pattern for item in fuse_(unfuse_(fused)).replaced] == ["conv_bn_act", "bn_act"]
    assert_same(fused, original, X, calls=2)  # conv, [conv, norm, ReLU], [norm, ReLU], Hardtanh


def test_slices_and_sums_are_plain():
    fused, original = pair_of(chain(*p1(), nn.Flatten()), ["conv_bn_act"])
    for part in (fused[:2], fused + fused, 2 * fused):
        assert type(part) is nn.Sequential
    with fused_calls(0):
        assert torch.equal(fused[:2](X), original[:2](X))
    assert len(fused) == 4 and fused[0].weight is fused[:2][0].weight


@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_a_call_that_raises_changes_nothing(impl):
    model = chain(*p1())
    fuse_(model, impl=impl)  # there are no fp64 kernels
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ImportError)):
        model(X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model[0].register_forward_hook(lambda *_: None)
    model(X)  # the original forward does not need them
    assert torch.equal(unfuse_(model)[1].num_batches_tracked, before["1.num_batches_tracked"] + 1)
