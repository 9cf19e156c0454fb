"""A block that cannot be fused, or whose names are no identifiers, does not keep other blocks from being fused."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels.surgery import fold_bn_, fuse_
from rir_kernels.surgery.patterns import fx_traced
from tests.support.surgery_helpers import CLOSE, X, assert_same, pair_of, settle
from tests.support.surgery_models import unit, with_forward


class Named(nn.Module):
    """Children and a parameter have the name; a decoy has the name that wrong escaping would make of it."""

    def __init__(self, name, decoy):
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.add_module(name, nn.Conv2d(4, 4, 1))
        self.add_module(decoy, nn.Conv2d(4, 4, 1))
        self.inner = nn.ModuleDict({name: nn.Conv2d(4, 4, 1), decoy: nn.Conv2d(4, 4, 1)})
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.holder = nn.Module()
        self.holder.register_parameter(name, nn.Parameter(torch.full((1,), 2.0)))
        self.holder.register_parameter(decoy, nn.Parameter(torch.full((1,), 3.0)))

    def forward(self, x):
        y = F.relu(self.bn(self.conv(getattr(self, self.name)(x))))
        return self.inner[self.name](y) * getattr(self.holder, self.name)


NAMES = [
    ("class", "klass"), ("None", "none"), ("print", "print_"), ("a\\there", "a\there"), ("it's", 'it"s'),
    ("1", "2"), ("naïve", "naive"), ("a b", "a_b"), ("{x}", "x"), ("x", "y"), ("line\nbreak", "line"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "decoy"), NAMES)
def test_names_of_children(name, decoy):
    original = settle(Named(name, decoy))
    fused = copy.deepcopy(original)
    report = fuse_(fused)
    assert [item.pattern for item in report.replaced] == ["conv_bn_act"] and report.coverage.fused == 1
    assert len(report.skipped) == report.coverage.convolutions - 1
    assert all("no norm behind it" in item.reason for item in report.skipped)
    assert_same(pickle.loads(pickle.dumps(fused)), original, X)


@pytest.mark.parametrize("name", ["class", "a\\there"])
def test_names_of_the_parts(name):
    torch.manual_seed(0)
    original = unit()
    original.add_module(name, nn.Conv2d(4, 4, 1))
    original.add_module("if", nn.BatchNorm2d(4))
    fused, original = pair_of(settle(original), ["conv_bn_act", "conv_bn"])
    assert_same(fused, original, X, calls=2)


def doubled_in_place(z):
    z += z
    return z


@pytest.mark.parametrize(
    "joined", [lambda z, x: z + z, lambda z, x: doubled_in_place(z), lambda z, x: z * 0.5 + z, lambda z, x: (z + z) + x]
)
def test_sums_with_itself(joined):
    torch.manual_seed(0)
    layer = with_forward(lambda self, x: F.relu(self.bn(joined(self.conv(x), x))))
    fused, original = pair_of(settle(nn.Sequential(layer(), unit())), ["bn_act", "conv_bn_act"])
    assert_same(fused, original, X, calls=2)


def test_a_constant_is_skipped():
    """The forward fails when it is called, but not when it is traced."""
    layer = with_forward(lambda self, x: self.bn(self.conv(1.0)) + x)
    report = fuse_(nn.Sequential(layer(), unit()))
    assert [item.name for item in report.replaced] == ["1"]
    assert [item.name for item in report.skipped] == ["0", "0.conv", "0.bn"]
    assert all("constant" in item.reason for item in report.skipped)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)], ids=["scripted", "traced"])
@pytest.mark.parametrize("change", [fuse_, fold_bn_])
def test_scripted_children_are_not_changed(make, change):
    torch.manual_seed(0)
    original = settle(nn.Sequential(unit(), make(settle(unit()).eval()))).eval()
    changed = copy.deepcopy(original)
    done = change(changed)
    assert change is fold_bn_ or [item.name for item in done.replaced] == ["0"]
    assert change is fuse_ or not isinstance(changed[0][1], nn.BatchNorm2d)
    torch.testing.assert_close(changed(X), original(X), **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_model():
    assert not fuse_(torch.jit.script(unit())).replaced


@pytest.mark.parametrize("place", ["find", "program"])
def test_a_fault_of_ours_skips_its_block_only(monkeypatch, place):
    model = nn.Sequential(unit(), unit())
    right = getattr(fx_traced.FAMILY, place)

    def faulty(module, *args):
        if module is model[0]:
            raise KeyError("a node")
        return right(module, *args)

    monkeypatch.setattr(fx_traced, "FAMILY", dataclasses.replace(fx_traced.FAMILY, **{place: faulty}))
    report = fuse_(model)
    assert [item.name for item in report.replaced] == ["1"]
    reason = "it cannot be fused: KeyError: 'a node'"
    found = [(item.name, item.reason) for item in report.skipped]
    assert found == [("0", reason), ("0.0", f"0: {reason}"), ("0.1", f"0: {reason}")]
