"""fuse_ fuses a convolution, a norm and a ReLU in a row within an nn.Sequential."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from rir_kernels.surgery import fuse_, unfuse_
from tests.support.surgery_helpers import (
    CONV_CHANGES,
    NORM_CHANGES,
    RELU_CHANGES,
    assert_change_is_noticed,
    assert_same,
    assert_same_after,
    double_output,
    fused_calls,
    pair_of,
    randn,
    settle,
    unchanged,
    units_skipped,
)
from tests.support.surgery_models import downsample

X = randn(2, 4, 7, 6)


def chain(*modules):
    torch.manual_seed(0)
    return settle(nn.Sequential(*modules))


def p1(channels=4, **options):
    conv = nn.Conv2d(4, channels, options.pop("kernel_size", 3), **options)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


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
    model = chain(
        *downsample(), nn.LeakyReLU(), nn.ReLU(), *p1(padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2), *p1(padding=1),
        *downsample(),
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
    index, change = CHANGES[name]
    model = chain(*p1(padding=1))
    model[2].inplace = False  # torch refuses a backward hook before an activation in place
    model.train(name != "other norm")  # that runs on a CPU only in evaluation, as the plain norm
    assert assert_change_is_noticed(lambda m: change(m[index]), model, before, X) == 0


def test_one_changed_run_leaves_the_others_fused():
    fused, original = pair_of(chain(*p1(), *p1()), ["conv_bn_act", "conv_bn_act"])
    assert_same_after(lambda m: double_output(m[4]), fused, original, X, calls=1)


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        (p1(kernel_size=2, padding="same"), "one side"),
        ([nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU()], "ConvTranspose2d is not a Conv2d"),
        (p1(dilation=(1, 2)), "dilation=(1, 2)"),
    ],
)
def test_refused(modules, reason):
    report = fuse_(model := nn.Sequential(*modules))
    assert not report.replaced and type(model) is nn.Sequential
    assert [item.name for item in units_skipped(report)] == [""]
    assert all(reason in item.reason for item in report.skipped)


def test_subclasses():
    class Doubling(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.Sequential):
        pass

    fused, original = pair_of(settle(Doubling(*p1(), Named(*p1()))), 2)
    assert [item.name for item in fuse_(original, dry_run=True).replaced] == ["", "3"]
    assert_same(fused, original, X, calls=2)


def test_a_leading_norm():
    fused, original = pair_of(
        chain(nn.BatchNorm2d(4), nn.ReLU(True), *p1(), nn.BatchNorm2d(4)), ["bn_act", "conv_bn_act"]
    )
    assert_same(fused, original, X, calls=2)


@pytest.mark.parametrize(("enabled", "other"), [("conv_bn_act", "conv_bn"), ("conv_bn", "conv_bn_act")])
def test_patterns(enabled, other):
    fused, original = pair_of(chain(*p1(), *downsample()), [enabled], patterns=[enabled])
    assert other in fuse_(original, patterns=[enabled], dry_run=True).skipped[0].reason
    assert_same(fused, original, X, calls=1)


def test_children_may_come_and_go():
    fused, original = pair_of(chain(*p1(padding=1), *p1(padding=1)), ["conv_bn_act", "conv_bn_act"])

    def change(model):
        del model[3]
        model.insert(1, nn.Conv2d(4, 4, 1))
        model.append(nn.Hardtanh())

    assert_same_after(change, fused, original, X, calls=0)
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
    batches = model[1].num_batches_tracked.clone()
    with unchanged(model), pytest.raises((TypeError, ImportError)):
        model(X)
    model[0].register_forward_hook(lambda *_: None)
    model(X)  # the original forward does not need the kernels
    assert torch.equal(unfuse_(model)[1].num_batches_tracked, batches + 1)
