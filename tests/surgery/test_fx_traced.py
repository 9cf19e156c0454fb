"""fuse_ finds the patterns in forwards that torch.fx traces, and fused models notice later changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels.surgery import unfuse_
from tests.support.surgery_helpers import (
    EXACT,
    X,
    assert_compiled_same,
    assert_same,
    assert_same_after,
    double_output,
    pair_of,
    randn,
    settle,
)
from tests.support.surgery_models import (
    Block,
    Generalized,
    PreBlock,
    Variant,
    conv,
    downsample,
    scaled,
    unit,
    with_forward,
)


def added_in_place(m, x):
    y = m.bn(m.conv(x))
    y += x
    return F.relu(y, inplace=True)


CBAA = ["conv_bn_add_act"]
FOUND = {
    "block": (Block(), ["conv_bn_act", *CBAA]),
    "block, downsample": (Block(downsample()), ["conv_bn_act", *CBAA, "conv_bn"]),
    "block, scaled": (Block(scale=0.5), ["conv_bn_act", "conv_bn_scaled_add_act"]),
    "pre-activation": (PreBlock(), ["bn_act", "conv_bn_act"]),
    "out of place": (with_forward(lambda m, x: F.relu(m.bn(m.conv(x)) + x))(), CBAA),
    "in place": (Variant(added_in_place), CBAA),
    "methods": (with_forward(lambda m, x: m.bn(m.conv(x)).add_(x).relu())(), CBAA),
    "identity first": (with_forward(lambda m, x: torch.relu(torch.add(x, m.bn(m.conv(x)))))(), CBAA),
    "no activation": (with_forward(lambda m, x: x + m.bn(m.conv(x)))(), CBAA),
    "scaled": (Variant(scaled), ["conv_bn_scaled_add_act"]),
    "one weight twice": (with_forward(lambda m, x: m.relu(m.conv(x) + m.bn(m.conv(x))))(), CBAA),
    "norm after the sum": (Generalized(), ["conv_add_bn_act"]),
}


def pair(model, patterns):
    torch.manual_seed(0)
    return pair_of(settle(copy.deepcopy(model)), patterns)


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("training", [True, False])
def test_found(name, training):
    fused, original = pair(*FOUND[name])
    inputs = [X, randn(2, 4, 6, 6, seed=1)][: 1 + isinstance(original, Generalized)]
    for _ in range(2):
        assert_same(fused.train(training), original.train(training), *inputs, calls=len(FOUND[name][1]))
    torch.testing.assert_close(unfuse_(fused).state_dict(), original.state_dict(), **EXACT)
    assert [type(m) for m in fused.modules()] == [type(m) for m in original.modules()]


class Counting(Variant):
    """Its forward changes buffers in place."""

    def __init__(self, function):
        super().__init__(function)
        self.register_buffer("steps", torch.zeros(4, 1, 1))


def counted(m, x):
    m.steps.add_(1)
    return m.block(x) + m.steps


def statistics_moved(m, x):
    m.bn.running_mean.add_(1)
    return m.block(x)


def counted_between(m, x):
    y = m.block(x + m.steps)
    m.steps.mul_(0.5).add_(1)
    return y * m.steps


def counted_by_an_operator(m, x):
    m.steps += 1
    return m.block(x)


OPTIONS = {
    "fuse_": {},
    "dry_run": {"dry_run": True},
    "refused": {"filter_fn": lambda module, name: False},
    "other patterns": {"patterns": ["conv_add_bn_act"]},
}


@pytest.mark.parametrize("function", [counted, statistics_moved, counted_between, counted_by_an_operator])
@pytest.mark.parametrize("options", OPTIONS)
def test_buffers_that_forward_changes(options, function):
    """Tracing runs forward without changing them; each call changes them, fused or not."""
    torch.manual_seed(0)
    original = settle(Counting(function))
    operations = int(options in ("fuse_", "dry_run") and function is not counted_by_an_operator)
    fused, _ = pair_of(original, operations, **OPTIONS[options])
    torch.testing.assert_close(fused.state_dict(), original.state_dict(), **EXACT)
    for _ in range(3):
        assert_same(fused, original, randn(2, 4, 5, 6), calls=operations if options == "fuse_" else 0)
    unfuse_(fused)
    assert_same(fused, original, randn(2, 4, 5, 6), calls=0)


# (change, fused calls that remain): a value that decides a branch undoes the whole forward, a part only its chain
LATER = {
    "no downsample": (lambda m: setattr(m, "downsample", None), 0),
    "other scale": (lambda m: setattr(m, "scale", 3.0), 1),
    "other activation": (lambda m: setattr(m, "relu", nn.SiLU()), 1),
    "hook": (lambda m: double_output(m.bn2), 2),
    "one norm in evaluation": (lambda m: m.bn2.eval(), 3),
    "other convolution": (lambda m: setattr(m, "conv1", nn.Conv2d(4, 4, 1)), 3),
    "grouped": (lambda m: setattr(m, "conv1", settle(conv(groups=2))), 2),
}


@pytest.mark.parametrize("name", LATER)
def test_changed_afterwards(name):
    change, calls = LATER[name]
    assert_same_after(change, *pair(*FOUND["block, downsample"]), X, calls=calls)


def test_method_replaced_on_the_instance():
    kind = with_forward(lambda self, x: self.norm(self.conv(x)), norm=lambda self, x: self.relu(self.bn(x)))
    fused, original = pair(kind(), ["conv_bn_act"])
    assert_same(fused, original, X, calls=1)
    assert_compiled_same(fused, original, lambda m: setattr(m, "norm", torch.sigmoid))
    assert_same(fused, original, X, calls=0)


def test_borders_of_children():
    """A ReLU behind a Sequential's last norm joins its chain; a Sequential that is a whole unit is fused by itself."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.shortcut = nn.Sequential(*unit(), conv(), nn.BatchNorm2d(4)), unit()

        def forward(self, x):
            return F.relu(self.body(x) + self.shortcut(x))

    fused, original = pair(Body(), ["conv_bn_act", "conv_bn_add_act", "conv_bn_act"])
    assert type(fused.body) is nn.Sequential and type(fused.shortcut) is not nn.Sequential
    assert_same(fused, original, X, calls=3)
    assert_same_after(lambda m: double_output(m.body), fused, original, X, calls=1)
