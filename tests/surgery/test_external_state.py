"""fuse_ notices when something changes that forward reads outside its module."""

import copy
import enum
import functools
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F

from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import X, assert_compiled_same, assert_same, fused_calls, pair_of, settle
from tests.support.surgery_models import Layer, with_forward

HERE = sys.modules[__name__]


class Mode(enum.Enum):
    PLAIN = 1
    DOUBLED = 2


class Config:
    factor = 1.0


SWITCH, FACTORS, OPTIONS, MODE, CONFIG = False, [1.0, 1.0], {"scale": {"by": 1.0}}, Mode.PLAIN, Config()
PARTIAL = functools.partial(torch.mul, other=1.0)


def helped(x):
    return x * 2 if SWITCH else x


def chosen(x):
    return x


def defaults(y, factor=1.0, *, shift=0.0):
    return y * factor + shift


class Base(Layer):
    count = 1


# (what forward computes, where it reads, the name there, another value)
CHANGES = {
    "BySwitch": (lambda m, x: m.block(x) * 2 if SWITCH else m.block(x), HERE, "SWITCH", True),
    "ByHelper": (lambda m, x: helped(m.block(x)), HERE, "SWITCH", True),
    "ByList": (lambda m, x: m.block(x) * FACTORS[0], HERE, "FACTORS", [2.0, 1.0]),
    "ByDict": (lambda m, x: m.block(x) * OPTIONS["scale"]["by"], OPTIONS["scale"], "by", 2.0),
    "ByMode": (lambda m, x: m.block(x) * (2 if MODE is Mode.DOUBLED else 1), HERE, "MODE", Mode.DOUBLED),
    "ByModule": (lambda m, x: m.block(x) * (2 if HERE.SWITCH else 1), HERE, "SWITCH", True),
    "ByInstance": (lambda m, x: m.block(x) * CONFIG.factor, CONFIG, "factor", 2.0),
    "ByClass": (lambda m, x: m.block(x) * Base.count, Base, "count", 2),
    "ByFunction": (lambda m, x: chosen(m.block(x)), HERE, "chosen", torch.neg),
    "ByDefaults": (lambda m, x: defaults(m.block(x)), defaults, "__kwdefaults__", {"shift": 1.0}),
    "ByPartial": (lambda m, x: PARTIAL(m.block(x)), PARTIAL.keywords, "other", 2.0),
    "ByCode": (lambda m, x: helped(m.block(x)), helped, "__code__", (lambda x: 3 * x).__code__),
    "ByBackends": (
        lambda m, x: m.block(x) * (2 if torch.backends.cudnn.benchmark else 1),
        torch.backends.cudnn, "benchmark", True,
    ),
}  # fmt: skip
KINDS = {name: type(name, (Base,), {"forward": forward}) for name, (forward, *_) in CHANGES.items()}
globals().update(KINDS)  # where pickle looks for a class


def pair(model):
    fused, original = pair_of(settle(model).eval(), ["conv_bn_act"])
    assert_same(fused, original, X, calls=1)
    return fused, original


def change(monkeypatch, name):
    _, owner, attribute, value = CHANGES[name]
    patch = monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr
    patch(owner, attribute, value)


@pytest.mark.parametrize("name", CHANGES)
def test_changed_afterwards(name, monkeypatch):
    fused, original = pair(KINDS[name]())
    models = fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))
    with monkeypatch.context() as patch:
        change(patch, name)
        for model in models:
            assert_same(model, original, X, calls=0)
    for model in models:
        assert_same(model, original, X, calls=1)  # with the old value it runs fused again


@pytest.mark.parametrize("name", ["BySwitch", "ByFunction", "ByDefaults", "ByList"])
def test_a_copy_that_is_pickled_after_the_change(name, monkeypatch):
    """It does not take the value that it finds for the one that its program was made with."""
    fused, original = pair(KINDS[name]())
    with monkeypatch.context() as patch:
        change(patch, name)
        copied = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(fused))))
        assert_same(copied, original, X, calls=0)


class ByMany(Base):
    def forward(self, x):
        y = helped(defaults(chosen(self.block(x)))) * OPTIONS["scale"]["by"] * CONFIG.factor
        return F.relu(y) if torch.jit.is_scripting() else y


def test_changed_after_compiling(monkeypatch):
    """One compiled model follows three changes."""
    names = "BySwitch", "ByDict", "ByDefaults"
    assert_compiled_same(*pair(ByMany()), *(lambda model, name=name: change(monkeypatch, name) for name in names))


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
        return self.block(x)


def test_variable_of_a_closure():
    fused, original = pair(Decorated())
    copied = pickle.loads(pickle.dumps(fused))
    for factor, calls in ((2.0, 0), (1.0, 1)):
        Decorated.forward.set_factor(factor)
        for model in (fused, copied):
            assert_same(model, original, X, calls=calls)


def asks_torch(m, x):
    """Each call asks these functions of torch again, because they take no arguments."""
    if torch.jit.is_scripting() or torch.are_deterministic_algorithms_enabled():
        return m.block(x) * 3
    return m.block(x) * (2 if torch.get_default_dtype() is torch.float64 else 1)


@pytest.mark.parametrize(
    ("setting", "value", "back"),
    [(torch.set_default_dtype, torch.float64, torch.float32), (torch.use_deterministic_algorithms, True, False)],
)
def test_answers_of_torch(setting, value, back):
    fused, original = pair(with_forward(asks_torch)())
    try:
        setting(value)
        assert_same(fused, original, X, calls=0)
    finally:
        setting(back)


def test_gradients_asked_where_they_make_no_difference():
    def forward(m, x):
        y = m.block(x)
        out = y
        if torch.is_grad_enabled():
            out = y  # the same
        return out

    fused, original = pair(with_forward(forward)())
    with torch.no_grad(), fused_calls(1):
        found = fused(X)
    assert torch.equal(found, original(X))


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
