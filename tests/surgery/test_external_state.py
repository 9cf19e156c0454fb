"""What forward reads outside its module: seen to change, or refused with a reason. Tolerance: see surgery_helpers."""

import copy
import enum
import functools
import pickle
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import CLOSE, X, assert_same, settle
from tests.support.surgery_models import Layer

HERE = sys.modules[__name__]


class Mode(enum.Enum):
    PLAIN = 1
    DOUBLED = 2


class Config:
    factor = 1.0


SWITCH, FACTORS, OPTIONS, MODE, CONFIG = False, [1.0, 1.0], {"scale": {"by": 1.0}}, Mode.PLAIN, Config()


PARTIAL = functools.partial(torch.mul, other=1.0)


def block(m, x):
    return m.relu(m.bn(m.conv(x)))


def helped(x):
    return x * 2 if SWITCH else x


def chosen(x):
    return x


def defaults(y, factor=1.0, *, shift=0.0):
    return y * factor + shift


class Base(Layer):
    count = 1

    def forward(self, x):
        return block(self, x)


class BySwitch(Base):
    def forward(self, x):
        return super().forward(x) * 2 if SWITCH else super().forward(x)


class ByHelper(Base):
    def forward(self, x):
        return helped(super().forward(x))


class ByCode(ByHelper):
    pass


class ByList(Base):
    def forward(self, x):
        return super().forward(x) * FACTORS[0]


class ByDict(Base):
    def forward(self, x):
        return super().forward(x) * OPTIONS["scale"]["by"]


class ByMode(Base):
    def forward(self, x):
        return super().forward(x) * (2 if MODE is Mode.DOUBLED else 1)


class ByModule(Base):
    def forward(self, x):
        return super().forward(x) * (2 if HERE.SWITCH else 1)


class ByInstance(Base):
    def forward(self, x):
        return super().forward(x) * CONFIG.factor


class ByClass(Base):
    def forward(self, x):
        return super().forward(x) * Base.count


class ByFunction(Base):
    def forward(self, x):
        return chosen(super().forward(x))


class ByDefaults(Base):
    def forward(self, x):
        return defaults(super().forward(x))


class ByPartial(Base):
    def forward(self, x):
        return PARTIAL(super().forward(x))


class ByBackends(Base):
    def forward(self, x):
        return super().forward(x) * (2 if torch.backends.cudnn.benchmark else 1)


CHANGES = {
    BySwitch: (HERE, "SWITCH", True),
    ByHelper: (HERE, "SWITCH", True),
    ByList: (HERE, "FACTORS", [2.0, 1.0]),
    ByDict: (OPTIONS["scale"], "by", 2.0),
    ByMode: (HERE, "MODE", Mode.DOUBLED),
    ByModule: (HERE, "SWITCH", True),
    ByInstance: (CONFIG, "factor", 2.0),
    ByClass: (Base, "count", 2),
    ByFunction: (HERE, "chosen", torch.neg),
    ByDefaults: (defaults, "__kwdefaults__", {"shift": 1.0}),
    ByPartial: (PARTIAL.keywords, "other", 2.0),
    ByCode: (helped, "__code__", (lambda x: 3 * x).__code__),
    ByBackends: (torch.backends.cudnn, "benchmark", True),
}


def pair(model):
    original = settle(model).eval()
    fused = copy.deepcopy(original)
    report = fuse_(fused)
    assert [item.pattern for item in report.replaced] == ["conv_bn_act"], str(report)
    assert_same(fused, original, X, calls=1)
    return fused, original


def change(monkeypatch, owner, name, value):
    patch = monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr
    patch(owner, name, value)


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_afterwards(kind, monkeypatch):
    fused, original = pair(kind())
    copied = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
    with monkeypatch.context() as patch:
        change(patch, *CHANGES[kind])
        for model in (fused, *copied):
            assert_same(model, original, X, calls=0)
    for model in (fused, *copied):
        assert_same(model, original, X, calls=1)  # as before, and fused again


@pytest.mark.parametrize("kind", [BySwitch, ByFunction, ByDefaults, ByList])
def test_a_copy_that_is_pickled_after_the_change(kind, monkeypatch):
    """It does not take what it finds for what its program was made by."""
    fused, original = pair(kind())
    with monkeypatch.context() as patch:
        change(patch, *CHANGES[kind])
        copied = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(fused))))
        assert_same(copied, original, X, calls=0)


class ByMany(Base):
    def forward(self, x):
        y = helped(defaults(chosen(super().forward(x)))) * OPTIONS["scale"]["by"] * CONFIG.factor
        return F.relu(y) if torch.jit.is_scripting() else y


def test_changed_after_compiling(monkeypatch):
    """One compiled model, changed three times."""
    fused, original = pair(ByMany())
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), original(X), **CLOSE)
    for kind in (BySwitch, ByDict, ByDefaults):
        change(monkeypatch, *CHANGES[kind])
        torch.testing.assert_close(compiled(X), original(X), **CLOSE)


def scaled_by(factor):
    def decorate(forward):
        @functools.wraps(forward)
        def wrapper(self, x):
            return forward(self, x) * factor

        def set_factor(value):
            nonlocal factor
            factor = value

        wrapper.set_factor = set_factor
        return wrapper

    return decorate


class Decorated(Layer):
    @scaled_by(1.0)
    def forward(self, x):
        return block(self, x)


def test_variable_of_a_closure():
    fused, original = pair(Decorated())
    copied = pickle.loads(pickle.dumps(fused))
    try:
        Decorated.forward.set_factor(2.0)
        for model in (fused, copied):
            assert_same(model, original, X, calls=0)
    finally:
        Decorated.forward.set_factor(1.0)
    for model in (fused, copied):
        assert_same(model, original, X, calls=1)


class AsksTorch(Layer):
    """Of what has no arguments torch is asked again at every call."""

    def forward(self, x):
        y = block(self, x)
        if torch.jit.is_scripting() or torch.are_deterministic_algorithms_enabled():
            return y * 3
        return y * 2 if torch.get_default_dtype() is torch.float64 else y


@pytest.mark.parametrize(
    ("setting", "value", "back"),
    [(torch.set_default_dtype, torch.float64, torch.float32), (torch.use_deterministic_algorithms, True, False)],
)
def test_answers_of_torch(setting, value, back):
    fused, original = pair(AsksTorch())
    try:
        setting(value)
        assert_same(fused, original, X, calls=0)
    finally:
        setting(back)


GENERATOR, NUMBERS, TORCHS, NOISE = random.Random(0), np.random.default_rng(0), torch.Generator(), torch.ones(())
DRAW = GENERATOR.random


def with_a_generator(m, x, generator=GENERATOR):
    return block(m, x) if generator.random() < 0.5 else x


def of_a_closure():
    generator = random.Random(0)
    return lambda m, x: block(m, x) if generator.random() < 0.5 else x


REFUSED = {
    "autocast asked": (lambda m, x: block(m, x) * (2 if torch.is_autocast_enabled("cpu") else 1), "autocast"),
    "dtype of autocast": (lambda m, x: block(m, x).to(torch.get_autocast_dtype("cpu")), "autocast"),
    "autocast off": (lambda m, x: off(m, x), "autocast"),
    "autocast decorates": (lambda m, x: decorated(m, x), "autocast"),
    "generator": (lambda m, x: block(m, x) if GENERATOR.random() < 0.5 else x, "GENERATOR"),
    "its method": (lambda m, x: block(m, x) if DRAW() < 0.5 else x, "DRAW"),
    "generator of NumPy": (lambda m, x: block(m, x) if NUMBERS.random() < 0.5 else x, "NUMBERS"),
    "generator of torch": (lambda m, x: x if torch.rand((), generator=TORCHS) < 0.5 else block(m, x), "TORCHS"),
    "of a default": (with_a_generator, "__defaults__"),
    "of a closure": (of_a_closure(), "random"),
    "a tensor": (lambda m, x: block(m, x) * NOISE, "NOISE"),
}


def off(m, x):
    with torch.autocast("cpu", enabled=False):
        return block(m, x)


@torch.autocast("cpu", enabled=False)
def decorated(m, x):
    return block(m, x)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, reason = REFUSED[name]
    model = settle(type("Net", (Layer,), {"forward": function})()).eval()
    states = GENERATOR.getstate(), TORCHS.get_state(), NUMBERS.bit_generator.state
    report = fuse_(model)
    assert not report.replaced and reason in report.skipped[0].reason, str(report)
    assert (GENERATOR.getstate(), NUMBERS.bit_generator.state) == (states[0], states[2])
    assert torch.equal(TORCHS.get_state(), states[1])


def test_gradients_asked_where_they_make_no_difference():
    def forward(m, x):
        y = block(m, x)
        out = y
        if torch.is_grad_enabled():
            out = y  # the same
        return out

    fused, original = pair(type("Net", (Layer,), {"forward": forward})())
    with torch.no_grad():
        assert torch.equal(fused(X), original(X))


def test_a_profiler_goes_on():
    seen = []
    sys.setprofile(lambda frame, event, argument: seen.append(event))
    try:
        fuse_(settle(Base()))
        del seen[:]
        helped(1)
    finally:
        sys.setprofile(None)
    assert "call" in seen
