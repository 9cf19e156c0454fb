"""Attributes that forward asked for and did not find, and that are there later: forward is run again, as it is.

In fp64 on a CPU, where fused and unfused differ by rounding: see surgery_helpers.
"""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn

from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import CLOSE, X, assert_same, settle
from tests.support.surgery_models import Layer


class Adapted(Layer):
    """Asks by getattr with a default, by hasattr, and by catching the error."""

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        adapter = getattr(self, "adapter", None)
        y = y if adapter is None else y + adapter(x)
        y = self.head(y) if hasattr(self, "head") else y
        try:
            return y * self.scale
        except AttributeError:
            return y


class AsksItsChild(Layer):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return y * 2 if hasattr(self.conv, "doubled") else y


def adapter(m):
    m.adapter = nn.Conv2d(4, 4, 1)


def head(m):
    m.head = nn.Conv2d(4, 4, 1)


def scale(m):
    m.scale = 3.0


def scale_as_buffer(m):
    m.register_buffer("scale", torch.full((1,), 3.0))


def scale_as_parameter(m):
    m.scale = nn.Parameter(torch.full((1,), 3.0))


def of_the_child(m):
    m.conv.doubled = False


def pair(model):
    original = settle(model).eval()
    fused = copy.deepcopy(original)
    assert [item.pattern for item in fuse_(fused).replaced] == ["conv_bn_act"]
    assert_same(fused, original, X, calls=1)
    return fused, original


def change_both(change, *models):
    for model in models:
        torch.manual_seed(1)
        change(model)
        model.double()


@pytest.mark.parametrize(
    ("model", "change"),
    [(Adapted, c) for c in (adapter, head, scale, scale_as_buffer, scale_as_parameter)]
    + [(AsksItsChild, of_the_child)],
)
def test_added_afterwards(model, change):
    fused, original = pair(model())
    change_both(change, fused, original)
    assert_same(fused, original, X, calls=0)


def test_added_to_the_class_afterwards(monkeypatch):
    fused, original = pair(Adapted())
    monkeypatch.setattr(Adapted, "scale", 3.0, raising=False)
    assert_same(fused, original, X, calls=0)


def test_added_to_a_copy():
    fused, original = pair(Adapted())
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        changed = copy.deepcopy(original)
        change_both(adapter, copied, changed)
        assert_same(copied, changed, X, calls=0)
    assert_same(fused, original, X, calls=1)


@pytest.mark.parametrize("change", [adapter, scale])
def test_added_to_a_compiled_model(change):
    fused, original = pair(Adapted())
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), original(X), **CLOSE)
    change_both(change, fused, original)
    torch.testing.assert_close(compiled(X), original(X), **CLOSE)


def test_class_with_a_look_up_of_its_own():
    """What it returns may change without a trace."""

    class Delegating(Layer):
        extra: ClassVar[dict] = {}

        def __getattr__(self, name):
            return self.extra[name] if name in self.extra else super().__getattr__(name)

        def forward(self, x):
            return self.relu(self.bn(self.conv(x))) * getattr(self, "scale", 1.0)

    model = settle(Delegating()).eval()
    report = fuse_(model)
    assert not report.replaced and "__getattr__" in report.skipped[0].reason, str(report)
    Delegating.extra["scale"] = 2.0
    assert torch.equal(model(X), model.relu(model.bn(model.conv(X))) * 2)
