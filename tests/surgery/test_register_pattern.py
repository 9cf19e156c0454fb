"""register_pattern makes tracing look into a class, or replaces the class's forward by one written by hand."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

import rir_kernels as rir
from rir_kernels.common import warn
from rir_kernels.surgery import fallback
from tests.support.surgery_helpers import X, assert_same, assert_same_after, double_output, pair_of, settle
from tests.support.surgery_models import Layer, with_forward


class ConvNorm(Layer):
    def forward(self, x):
        return self.bn(self.conv(x))


class Gate(ConvNorm):
    """torch.fx cannot trace it, because its branch depends on numbers."""

    active = True

    def forward(self, x):
        return self.bn(self.conv(x)) + x if x.sum() > -1e6 else x


def block(branch):
    model = with_forward(lambda m, x: torch.relu(m.branch(x) + x), nn.Module)()
    model.branch = branch
    return model


def gate(module, x, *, impl):
    return rir.surgery.conv_bn_act(x, module.conv, module.bn, None, x, impl=impl)


PARTS = {"conv": nn.Conv2d, "bn": nn.BatchNorm2d}


@pytest.fixture(autouse=True)
def _clean():
    yield
    for kind in (ConvNorm, Gate):
        rir.unregister_pattern(kind)


def pair(model, patterns, **options):
    torch.manual_seed(0)
    return pair_of(settle(model), patterns, **options)


def test_tracing_looks_into_a_registered_class():
    pair(block(ConvNorm()), ["conv_bn"])
    assert rir.register_pattern(ConvNorm) is ConvNorm  # a decorator of the class, too
    fused, original = pair(block(ConvNorm()), ["conv_bn_add_act"])
    assert_same(fused, original, X)
    assert_same_after(lambda m: double_output(m.branch), fused, original, X, calls=0)


def test_only_the_exact_class():
    class Doubling(ConvNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    rir.register_pattern(ConvNorm)
    fused, original = pair(block(Doubling()), ["conv_bn"])
    assert_same(fused, original, X)


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_written_by_hand(training):
    assert "cannot be traced" in rir.fuse_(Gate()).skipped[0].reason
    rir.register_pattern(Gate, pattern="conv_bn_add_act", parts=PARTS)(gate)
    fused, original = pair(Gate().train(training), ["conv_bn_add_act"])
    for _ in range(2):
        assert_same(fused, original, X)
    assert_same(pickle.loads(pickle.dumps(fused)), copy.deepcopy(original), X)
    assert type(rir.unfuse_(fused)) is Gate
    assert_same(fused, original, X, calls=0, exact=True)


def test_a_bypassed_part_that_changes():
    rir.register_pattern(Gate, pattern="conv_bn_add_act", parts=PARTS)(gate)
    fused, original = pair(Gate(), ["conv_bn_add_act"])
    assert_same_after(lambda m: double_output(m.bn), fused, original, X, calls=0)
    assert "bn: a hook" in rir.fuse_(original).skipped[0].reason


def test_a_registered_obstacle(monkeypatch):
    """The status and the record give its reason, and nobody is warned of it, unlike of an obstacle that fuse_ finds."""
    monkeypatch.setattr(fallback, "_told", set())
    monkeypatch.setattr(warn, "_warned", set())
    register = rir.register_pattern(
        Gate, pattern="conv_bn_add_act", parts=PARTS, obstacle=lambda m: "" if m.active else "it is closed"
    )
    register(gate)
    fused, original = pair(Gate(), ["conv_bn_add_act"])
    assert_same(fused, original, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_after(lambda m: setattr(m, "active", False), fused, original, X, calls=0)
    assert rir.fuse_(original).skipped[0].reason == "it is closed"
    assert [(one.pattern, one.reason) for one in rir.fusion_status(fused)] == [("conv_bn_add_act", "it is closed")]
    fused.conv.groups = 2
    reason = "conv: groups > 1: only ungrouped convolutions are fused"
    with pytest.raises(RuntimeError), pytest.warns(RuntimeWarning, match=reason):  # the weight is not a grouped one
        fused(X)
    assert rir.fusion_status(fused)[0].reason == reason
    assert rir.fused_source(fused) == inspect.getsource(gate)


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
