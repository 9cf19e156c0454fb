"""register_pattern: classes that are looked into, and forwards written by hand; the tolerance is surgery_helpers'."""

import copy
import pickle

import pytest
import torch
from torch import nn

import rir_kernels as rir
from tests.support.surgery_helpers import X, assert_same, settle


class ConvNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = ConvNorm()

    def forward(self, x):
        return torch.relu(self.branch(x) + x)


class Gate(ConvNorm):
    """Which way it goes depends on numbers: torch.fx cannot trace it."""

    active = True

    def forward(self, x):
        return self.bn(self.conv(x)) + x if x.sum() > -1e6 else x


def gate(module, x, *, impl):
    return rir.surgery.conv_bn_act(x, module.conv, module.bn, None, x, impl=impl)


PARTS = {"conv": nn.Conv2d, "bn": nn.BatchNorm2d}


@pytest.fixture(autouse=True)
def _clean():
    yield
    for kind in (ConvNorm, Gate):
        rir.unregister_pattern(kind)


def pair_of(model, patterns, **options):
    torch.manual_seed(0)
    original = settle(model)
    fused = copy.deepcopy(original)
    assert [item.pattern for item in rir.fuse_(fused, **options).replaced] == patterns
    return fused, original


def test_a_class_that_is_looked_into():
    pair_of(Block(), ["conv_bn"])
    assert rir.register_pattern(ConvNorm) is ConvNorm  # a decorator of the class, too
    fused, original = pair_of(Block(), ["conv_bn_add_act"])
    assert_same(fused, original, X)
    for model in (fused, original):
        model.branch.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    assert_same(fused, original, X, calls=0)


def test_only_the_exact_class():
    class Doubling(ConvNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    rir.register_pattern(ConvNorm)
    model = Block()
    model.branch = Doubling()
    fused, original = pair_of(model, ["conv_bn"])
    assert_same(fused, original, X)


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_written_by_hand(training):
    assert "cannot be traced" in rir.fuse_(Gate()).skipped[0].reason
    rir.register_pattern(Gate, pattern="conv_bn_add_act", parts=PARTS)(gate)
    fused, original = pair_of(Gate().train(training), ["conv_bn_add_act"])
    for _ in range(2):
        assert_same(fused, original, X)
    assert_same(pickle.loads(pickle.dumps(fused)), copy.deepcopy(original), X)
    assert type(rir.unfuse_(fused)) is Gate
    assert_same(fused, original, X, calls=0, exact=True)


def test_a_bypassed_part_that_changes():
    rir.register_pattern(Gate, pattern="conv_bn_add_act", parts=PARTS)(gate)
    fused, original = pair_of(Gate(), ["conv_bn_add_act"])
    for model in (fused, original):
        model.bn.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    assert_same(fused, original, X, calls=0)
    assert "bn: a hook" in rir.fuse_(original).skipped[0].reason


def test_an_obstacle_of_ones_own():
    rir.register_pattern(
        Gate, pattern="conv_bn_add_act", parts=PARTS, obstacle=lambda m: "" if m.active else "it is closed"
    )(gate)
    fused, original = pair_of(Gate(), ["conv_bn_add_act"])
    assert_same(fused, original, X)
    for model in (fused, original):
        model.active = False
    assert_same(fused, original, X, calls=0)
    assert rir.fuse_(original).skipped[0].reason == "it is closed"


def test_impl_is_handed_on():
    seen = []
    rir.register_pattern(Gate, pattern="conv_bn_add_act", parts=PARTS)(lambda m, x, *, impl: seen.append(impl) or x)
    model = Gate()
    rir.fuse_(model, impl="reference")
    model(X.float())
    assert seen == ["reference"]


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((Gate(),), {}, TypeError),
        ((int,), {}, TypeError),
        ((Gate,), {"parts": PARTS}, ValueError),
        ((Gate,), {"pattern": "P7", "parts": PARTS}, ValueError),
        ((Gate,), {"pattern": "conv_bn_add_act"}, ValueError),
        ((Gate,), {"pattern": "conv_bn_add_act", "parts": {"conv": "Conv2d"}}, ValueError),
    ],
    ids=str,
)
def test_mistakes(arguments, options, error):
    with pytest.raises(error, match=r"must|belong"):
        rir.register_pattern(*arguments, **options)
