"""Blocks of one class share a trace if, and only if, their forwards compute the same.

The second of two blocks differs in one thing; the unfused copy is the oracle.
"""

import copy
import functools
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels.surgery import fuse_, tracing
from rir_kernels.surgery.reuse import likeness
from tests.support.surgery_helpers import X, assert_same, pair_of, settle
from tests.support.surgery_models import Layer

NUMBERS = {}
ONCE = 2  # traces of a block: a sketch that looks into `steps`, and one that does not


class Block(Layer):
    power = 2

    def __init__(self):
        super().__init__()
        self.first, self.second, self.after, self.options = nn.BatchNorm2d(4), nn.BatchNorm2d(4), None, [1, 0]
        self.steps = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())
        self.register_parameter("gain", None)
        self.factor, self.activation, self.depth, self.scale = 3, F.tanh, 0.5, nn.Parameter(torch.ones(1))

    def forward(self, x):
        y = self.block(x)
        y = self.second(y) - 0.5 * self.first(y)
        for step in self.steps:
            y = step(y)
        y = y if self.after is None else self.after(y)
        y = y if self.gain is None else y * self.gain
        y = self.raised(self.activation(y)) * self.scale + getattr(self, "shift", 0)
        y = y * 2 if hasattr(self.conv, "doubled") else y
        return y + torch.full_like(y, 1.0).int() * self.factor / 2 + self.cached() + self.options[0]

    def raised(self, y):
        return y**self.power

    @functools.lru_cache  # noqa: B019
    def cached(self):
        return self.depth


class Known(Layer):
    """The result depends on which instance it is."""

    def forward(self, x):
        return self.block(x) * NUMBERS[self.relu]


class Plain(Block):
    """It has no cache, which would keep a trace from serving another block."""

    def cached(self):
        return self.depth


def two(kind):
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind())


def traced(monkeypatch):
    """A list that grows by the class of each module that is traced from now on."""
    modules, anew = [], tracing._trace_anew

    def counting(module, *args):
        modules.append(type(module))
        return anew(module, *args)

    monkeypatch.setattr(tracing, "_trace_anew", counting)
    return modules


def fused_as_unfused(model):
    fused, original = pair_of(settle(model).eval(), ["conv_bn_act"] * 2)
    assert_same(fused, original, X, calls=2)


def test_alike(monkeypatch):
    modules = traced(monkeypatch)
    fused_as_unfused(two(Plain))
    assert modules.count(Plain) == ONCE


def adds(name, value):
    return lambda block: setattr(block, name, value)


def scale_is_a_number(block):
    del block.scale
    block.scale = 3.0


def scale_is_a_parameter_of_the_child(block):
    block.scale = block.bn.weight
    block.scale.data = block.scale.data[:1].clone()
    block.bn.weight = nn.Parameter(torch.ones(4))
    block.first.weight = block.bn.weight


DIFFERENCES = {
    "attribute that was absent": adds("shift", 2.0),
    "buffer that was absent": lambda block: block.register_buffer("shift", torch.ones(1)),
    "attribute of the child": lambda block: setattr(block.conv, "doubled", True),
    "child that was None": adds("after", nn.Sigmoid()),
    "parameter that was None": adds("gain", nn.Parameter(torch.full((1,), 2.0))),
    "shared child": lambda block: setattr(block, "second", block.first),
    "shared parameter": scale_is_a_parameter_of_the_child,
    "children in another order": lambda block: setattr(block, "steps", nn.Sequential(*reversed(block.steps))),
    "child of another class": adds("steps", nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid())),
    "child with other names": adds("steps", nn.Sequential(OrderedDict(one=nn.Conv2d(4, 4, 1), two=nn.Tanh()))),
    "default that is overridden": adds("power", 3),
    "other kind of number": adds("factor", 3.5),
    "other function": adds("activation", F.silu),
    "other item": adds("options", [2, 0]),
    "parameter that is a number": scale_is_a_number,
    "other method": adds("raised", torch.abs),
    "number behind a property": adds("depth", 0.25),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_one_differs(name, monkeypatch):
    modules = traced(monkeypatch)
    model = two(Plain)
    DIFFERENCES[name](model[1])
    fused_as_unfused(model)
    assert modules.count(Plain) == 2 * ONCE


@pytest.mark.parametrize("value", [3.0, True])
def test_equal_numbers_of_another_type(value, monkeypatch):
    """The numbers of both blocks compare equal, but dtypes follow their types."""
    modules = traced(monkeypatch)
    model = two(Plain)
    model[0].factor = int(value)
    model[1].factor = value
    fused_as_unfused(model)
    assert modules.count(Plain) == 2 * ONCE


def test_method_with_a_cache():
    """The cached method does not read its attributes again when it is called again."""
    model = two(Block)
    model[1].depth = 0.25
    fused_as_unfused(model)


def test_table_of_modules(monkeypatch):
    modules, model = traced(monkeypatch), two(Known)
    monkeypatch.setitem(NUMBERS, model[0].relu, 2.0)
    monkeypatch.setitem(NUMBERS, model[1].relu, 5.0)
    assert fuse_(settle(model).eval()).replaced and modules.count(Known) == 2
    y = model[0].relu(model[0].bn(model[0].conv(X))) * 2
    torch.testing.assert_close(model(X), model[1].relu(model[1].bn(model[1].conv(y))) * 5)


def test_a_parameter_that_is_the_only_none():
    """No other attribute that is None could make the difference."""
    bare, full = nn.Tanh(), nn.Tanh()
    bare.register_parameter("gain", None)
    full.gain = nn.Parameter(torch.ones(1))
    assert likeness(bare) != likeness(full) == likeness(copy.deepcopy(full))
