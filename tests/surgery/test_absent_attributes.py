"""An attribute that forward asked for and did not find may exist later: then the original forward runs."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn

from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import X, assert_compiled_same, assert_same, assert_same_after, pair_of, settle
from tests.support.surgery_models import Layer, with_forward


class Adapted(Layer):
    """It asks by getattr with a default, by hasattr, and by catching the error."""

    def forward(self, x):
        y = self.block(x)
        adapter = getattr(self, "adapter", None)
        y = y if adapter is None else y + adapter(x)
        y = self.head(y) if hasattr(self, "head") else y
        try:
            return y * self.scale
        except AttributeError:
            return y


AsksItsChild = with_forward(lambda m, x: m.block(x) * (2 if hasattr(m.conv, "doubled") else 1))
ADDED = {
    "adapter": (Adapted, lambda m: setattr(m, "adapter", nn.Conv2d(4, 4, 1))),
    "head": (Adapted, lambda m: setattr(m, "head", nn.Conv2d(4, 4, 1))),
    "scale": (Adapted, lambda m: setattr(m, "scale", 3.0)),
    "scale, a buffer": (Adapted, lambda m: m.register_buffer("scale", torch.full((1,), 3.0))),
    "scale, a parameter": (Adapted, lambda m: setattr(m, "scale", nn.Parameter(torch.full((1,), 3.0)))),
    "of a child": (AsksItsChild, lambda m: setattr(m.conv, "doubled", False)),
}


def pair(model):
    fused, original = pair_of(settle(model).eval(), ["conv_bn_act"])
    assert_same(fused, original, X, calls=1)
    return fused, original


@pytest.mark.parametrize("name", ADDED)
def test_added_afterwards(name):
    kind, change = ADDED[name]
    assert_same_after(change, *pair(kind()), X, calls=0)


def test_added_to_the_class_afterwards(monkeypatch):
    fused, original = pair(Adapted())
    monkeypatch.setattr(Adapted, "scale", 3.0, raising=False)
    assert_same(fused, original, X, calls=0)


def test_added_to_a_copy():
    fused, original = pair(Adapted())
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same_after(ADDED["adapter"][1], copied, copy.deepcopy(original), X, calls=0)
    assert_same(fused, original, X, calls=1)


@pytest.mark.parametrize("name", ["adapter", "scale"])
def test_added_to_a_compiled_model(name):
    assert_compiled_same(*pair(Adapted()), ADDED[name][1])


def test_class_with_its_own_getattr():
    """What __getattr__ returns may change without a trace."""

    class Delegating(Layer):
        extra: ClassVar[dict] = {}

        def __getattr__(self, name):
            return self.extra[name] if name in self.extra else super().__getattr__(name)

        def forward(self, x):
            return self.block(x) * getattr(self, "scale", 1.0)

    model = settle(Delegating()).eval()
    report = fuse_(model)
    assert not report.replaced and "__getattr__" in report.skipped[0].reason, str(report)
    Delegating.extra["scale"] = 2.0
    assert torch.equal(model(X), model.relu(model.bn(model.conv(X))) * 2)
