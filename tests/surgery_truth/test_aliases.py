"""Modules and parameters with two names, of which a graph has one: later the two may be different things."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels.surgery import fuse_
from tests.surgery_helpers import assert_same, fused_calls, randn, settle

X = randn(2, 4, 6, 6)


class Net(nn.Module):
    """forward goes by the second name of a convolution, of a part of a Sequential, and of a tied parameter."""

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


def new_weight(m):
    m.other.weight = nn.Parameter(2 * m.other.weight.detach())


def both_names(m):
    m.conv = m.again = m.body[0] = copy.deepcopy(m.conv)
    m.conv.weight.data.mul_(2)


@pytest.mark.parametrize(
    ("way", "change", "calls"),
    [
        ("child", new_conv, 0), ("inlined", new_conv, 0), ("tied", new_weight, 0), ("child", both_names, 1),
        ("inlined", both_names, 1),
    ],
)  # fmt: skip
def test_one_of_the_names_gets_another(way, change, calls):
    original = settle(Net(way)).eval()
    fused = copy.deepcopy(original)
    assert [item.pattern for item in fuse_(fused, filter_fn=lambda module, name: not name).replaced] == ["P3"]
    assert_same(fused, original, X)
    for model in (fused, original):
        change(model)
    assert_same(fused, original, X, calls=calls)


class Shared(nn.Module):
    """One norm, called by a fused child and by a forward that is not fused."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), self.bn, nn.ReLU())

    def forward(self, x):
        return self.body(self.bn(torch.tanh(self.conv(x))))


def test_a_norm_that_is_called_elsewhere_keeps_its_backward():
    """torch's norm keeps the running statistics for backward: those that are moved since are not another version."""
    original = settle(Shared())
    fused = copy.deepcopy(original)
    fuse_(fused)
    version = fused.bn.running_mean._version
    assert_same(fused, original, X)
    assert fused.bn.running_mean._version == version
    with fused_calls(1):
        fused(X)
