"""Questions of forward that leave no trace: whether two names mean one object, classes, attributes by a string.

A graph has one name of a module or parameter that has two; later the two names may mean different objects.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import (
    X,
    assert_compiled_same,
    assert_same,
    assert_same_after,
    fused_calls,
    pair_of,
    settle,
)
from tests.support.surgery_models import Layer, with_forward


class Net(nn.Module):
    """forward uses the second name of a convolution, of a part of a Sequential, or of a tied parameter."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv, self.bn, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.again, self.body = self.conv, nn.Sequential(self.conv)
        self.tied = nn.Conv2d(4, 4, 1)
        self.tied.weight = self.other.weight

    def forward(self, x):
        if self.way == "child":
            return F.relu(self.bn(self.again(x)) + self.other(x))
        if self.way == "inlined":
            return F.relu(self.bn(self.body(x)) + self.other(x))
        return F.relu(self.bn(self.conv(x)) + F.conv2d(x, self.tied.weight))


def new_conv(m):
    m.conv = copy.deepcopy(m.conv)
    m.conv.weight.data.mul_(2)


def new_conv_under_two_names(m):
    new_conv(m)
    m.again = m.conv


def new_weight(m):
    m.other.weight = nn.Parameter(2 * m.other.weight.detach())


def both_names(m):
    m.conv = m.again = m.body[0] = copy.deepcopy(m.conv)
    m.conv.weight.data.mul_(2)


@pytest.mark.parametrize(
    ("way", "change", "calls"),
    [
        ("child", new_conv, 0), ("inlined", new_conv, 0), ("inlined", new_conv_under_two_names, 0),
        ("child", new_conv_under_two_names, 1), ("tied", new_weight, 0), ("child", both_names, 1),
        ("inlined", both_names, 1),
    ],
)  # fmt: skip
def test_one_name_is_rebound(way, change, calls):
    fused, original = pair_of(settle(Net(way)).eval(), ["conv_bn_add_act"], filter_fn=lambda module, name: not name)
    assert_same(fused, original, X)
    assert_same_after(change, fused, original, X, calls=calls)


def test_one_name_is_rebound_after_compiling():
    assert_compiled_same(*pair_of(settle(Net("child")).eval(), 1), new_conv)


class Asking(Layer):
    """Its forward asks a question and multiplies by the answer."""

    kind, rates = 1, (1.0,)

    def __init__(self):
        super().__init__(bias=True)
        self.other, self.layers = nn.BatchNorm2d(4), nn.ModuleList([nn.Tanh()])


def _asks(number):
    return with_forward(lambda self, x: self.block(x) * (1 + number(self)), Asking)


class BySuper(Asking):
    def forward(self, x):
        return self.block(x) * super().kind


def _by_import(m, x):
    from math import tau

    return m.block(x) * tau


def other_is(value):
    return lambda patch, model: setattr(model, "other", value())


def of_the_class(name, value):
    return lambda patch, model: patch.setattr(Asking, name, value)


def of_the_weight(patch, model):
    model.other.weight = model.bn.weight


def the_norm(patch, model):
    model.other = model.bn


def in_a_list(patch, model):
    model.layers[0] = nn.ReLU()


def matches(m):
    match m.other:
        case nn.BatchNorm2d():
            return 1
    return 0


_called = with_forward(lambda m, x: m.layers[0](m.block(x)) * (1 + isinstance(m.layers[0], nn.Tanh)), Asking)

ASKED = {
    "type": (_asks(lambda m: type(m).kind), of_the_class("kind", 2)),
    "class": (_asks(lambda m: m.__class__.kind), of_the_class("kind", 2)),
    "class, absent": (
        _asks(lambda m: getattr(type(m), "absent", 0)),
        lambda p, m: p.setattr(Asking, "absent", 1, False),
    ),
    "super": (BySuper, of_the_class("kind", 2)),
    "import": (with_forward(_by_import, Asking), lambda patch, model: patch.setattr(math, "tau", 1.0)),
    "a module's, absent": (_asks(lambda m: hasattr(nn, "absent")), lambda p, m: p.setattr(nn, "absent", 1, False)),
    "type of a child": (_asks(lambda m: type(m.other) is nn.BatchNorm2d), other_is(nn.Identity)),
    "isinstance": (_asks(lambda m: isinstance(m.other, nn.BatchNorm2d)), other_is(nn.Identity)),
    "isinstance in a list": (_asks(lambda m: sum(isinstance(one, nn.Tanh) for one in m.layers)), in_a_list),
    "name of the class": (_asks(lambda m: m.other.__class__.__name__ == "Identity"), other_is(nn.Identity)),
    "match": (_asks(matches), other_is(nn.Identity)),
    "isinstance of a called child": (_called, in_a_list),
    "same child": (_asks(lambda m: m.bn is m.other), the_norm),
    "equal child": (_asks(lambda m: m.bn == m.other), the_norm),
    "same weight": (_asks(lambda m: m.bn.weight is m.other.weight), of_the_weight),
}


@pytest.mark.parametrize("name", ASKED)
def test_changed_answers(name, monkeypatch):
    make, change = ASKED[name]
    fused, original = pair_of(settle(make()).eval(), 1)
    with fused_calls(1):
        before = fused(X)
    with monkeypatch.context() as patch, fused_calls(0):
        for model in (fused, original):
            change(patch, model)
        assert torch.equal(fused(X), original(X)) and not torch.allclose(fused(X), before)


class Named(Asking):
    """An attribute has the name of a function that may read anything."""

    vars = 2

    def forward(self, x):
        return self.block(x) * self.vars


def test_attribute_named_like_a_function_that_reads_anything():
    assert fuse_(settle(Named())).replaced


class Shared(Layer):
    """A fused child and a forward that is not fused call the same norm."""

    def __init__(self):
        super().__init__(bias=True)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), self.bn, nn.ReLU())

    def forward(self, x):
        return self.body(self.bn(torch.tanh(self.conv(x))))


def test_norm_called_elsewhere_keeps_its_backward():
    """torch's norm saves the running statistics for backward: updating them later may not change their version."""
    fused, original = pair_of(settle(Shared()), 1)
    version = fused.bn.running_mean._version
    assert_same(fused, original, X)
    assert fused.bn.running_mean._version == version
    with fused_calls(1):
        fused(X)
