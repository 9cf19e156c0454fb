"""Tracing makes modules tell what is read of them: by their own classes, for the moment, and whatever happens.

nn.Module stays as it is: Python forgets, at each change of a class, what it knows of all its subclasses, so a change of
that one costs as much as there are subclasses of it in the process.
"""

import contextlib
import sys
import threading

import pytest
import torch
from torch import nn
from torch.fx import _symbolic_trace
from torch.fx._symbolic_trace import is_fx_tracing

from rir_kernels.surgery import fold_bn_, fuse_, recording, unfuse_
from tests.support.surgery_helpers import X, assert_same, settle, units_skipped
from tests.support.surgery_models import Block, Layer
from tests.surgery.test_trace_reuse import pair_of
from tests.surgery.test_trace_reuse import traced as traced_modules

OF_MODULES = {name: getattr(nn.Module, name) for name in ("__getattribute__", "__getattr__", "__setattr__", "__call__")}


class Calls(Layer):
    """Its forward does something first."""

    def __init__(self, first):
        super().__init__()
        self.first, self.body = first, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        self.first(self)
        return self.body(self.relu(self.bn(self.conv(x))))


def nothing(module):
    pass


def untouched(model):
    """Whether all classes look names up as they did."""
    return not any("__getattribute__" in vars(kind) for module in model.modules() for kind in type(module).__mro__[:-1])


def looks_at_modules(module):
    for name, method in OF_MODULES.items():
        if getattr(nn.Module, name) is not method:
            raise ValueError(name)
    if object.__getattribute__(type(module), "__getattribute__") is OF_MODULES["__getattribute__"]:
        raise ValueError("nobody records")


def test_the_base_of_all_modules_is_left_alone():
    """Seen from within a forward that is traced."""
    report = fuse_(Calls(looks_at_modules))
    assert len(report.replaced) == 2, str(report)


class Kinds(set):
    added = 0

    def add(self, kind):
        Kinds.added += kind not in self
        super().add(kind)


@pytest.mark.parametrize("blocks", [1, 12])
def test_the_work_is_that_of_the_kinds_of_blocks(blocks, monkeypatch):
    """However many there are: classes changed, and forwards traced."""
    modules, changed = traced_modules(monkeypatch), Kinds()
    monkeypatch.setattr(recording, "_changed", changed)
    monkeypatch.setattr(Kinds, "added", 0)
    report = fuse_(nn.Sequential(nn.Sequential(*(Block() for _ in range(blocks)))))
    assert len(report.replaced) == 2 * blocks and modules.count(Block) == 1
    # those within a Block; the rest has been looked at already, or has no norm within reach
    assert Kinds.added == len({type(module) for module in Block().modules()}) and not changed


def fails(module):
    raise ValueError


def exits(module):
    raise SystemExit


def interrupts(module):
    raise KeyboardInterrupt


def sets_an_attribute(module):
    module.calls = 1


@pytest.mark.parametrize("first", [fails, exits, sets_an_attribute])
def test_restored_after_a_refusal(first):
    model = nn.Sequential(Calls(first), Block())
    assert len(units_skipped(fuse_(model))) == 1 and untouched(model)


def test_restored_after_an_interruption():
    model = nn.Sequential(Block(), Calls(interrupts))
    with pytest.raises(KeyboardInterrupt):
        fuse_(model)
    assert untouched(model) and type(model[0]) is Block


def test_restored_after_an_error_of_the_filter():
    """Which is called between the traces."""
    model = nn.Sequential(Block(), Block())

    def filter_fn(module, name):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fuse_(model, filter_fn=filter_fn)
    assert untouched(model)


def test_fused_within_a_filter():
    other, model = Block(), nn.Sequential(Block(), Calls(nothing))
    report = fuse_(model, filter_fn=lambda module, name: bool(fuse_(unfuse_(other)).replaced))
    assert len(report.replaced) == 4 and untouched(model) and untouched(unfuse_(other))


def fuses(module):
    fuse_(module.body)


def only_looks(module):
    fuse_(module.body, dry_run=True)


def folds(module):
    fold_bn_(module.body, dry_run=True)


def fuses_and_catches(module):
    with contextlib.suppress(BaseException):  # as a bare except does
        fuse_(module.body)


@pytest.mark.parametrize("first", [fuses, only_looks, folds, fuses_and_catches])
def test_fused_within_a_forward(first):
    """That forward is left alone, and what it would have changed as well."""
    model = Calls(first)
    report = fuse_(model)
    assert [item.reason for item in units_skipped(report)] == ["its forward fuses or folds a model"]
    assert [item.name for item in report.replaced] == ["body"] and untouched(unfuse_(model))
    assert type(model.body[1]) is nn.BatchNorm2d and model.body.training


def sets_and_catches(module):
    with contextlib.suppress(BaseException):
        module.calls = 1


def reads_a_namespace(module):
    return vars(module).get("scale")


def calls_another(module):
    OTHER(None)


def asks_whether_it_is_traced(module):
    return module if is_fx_tracing() else None


OTHER = nn.Conv2d(4, 4, 1).double()


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (sets_and_catches, "sets the attribute 'calls'"),
        (reads_a_namespace, "calls vars"),
        (calls_another, "none of its children"),
        (asks_whether_it_is_traced, "is_fx_tracing"),
    ],
)
def test_refused(first, reason):
    report = fuse_(Calls(first))
    assert [item.name for item in report.replaced] == ["body"] and reason in report.skipped[0].reason, str(report)


def test_torch_is_told_that_fx_traces(monkeypatch):
    """Through the context that torch has for it from 2.14 on, where no global says it any longer."""
    told = []

    @contextlib.contextmanager
    def context(value):
        told.append(value)
        yield
        told.append("before")

    monkeypatch.setattr(_symbolic_trace, "_is_fx_tracing_context", context, raising=False)
    monkeypatch.delattr(_symbolic_trace, "_is_fx_tracing_flag", raising=False)
    assert "conv_bn_act" in [item.pattern for item in fuse_(Calls(nothing)).replaced]
    assert told[:2] == [True, "before"]


def test_class_with_its_own_look_up():
    class Doubling(nn.Identity):
        def __getattribute__(self, name):
            return 2 if name == "factor" else super().__getattribute__(name)

    model = Calls(nothing)
    model.doubling = Doubling()
    report = fuse_(model)
    assert [item.name for item in report.replaced] == ["body"] and "__getattribute__" in report.skipped[0].reason
    assert model.doubling.factor == 2 and "__getattribute__" in vars(Doubling)


def test_another_thread_runs_another_model():
    """Of the same classes, while this one traces."""
    other, found, stop = settle(Block()).eval(), [], threading.Event()
    expected = other(X)

    def run():
        while not stop.is_set():
            if recording._tracers:
                try:
                    found.append(torch.equal(other(X), expected))
                    other.eval()  # sets attributes
                except BaseException as error:
                    found.append(error)

    thread, interval = threading.Thread(target=run), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        while len(found) < 3:
            assert len(fuse_(Block()).replaced) == 2
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert set(found) == {True}


@torch.fx.wrap
def opaque(x):
    return x * 2 if x.sum() > 0 else x


class CallsOpaque(Layer):
    def forward(self, x):
        return opaque(self.relu(self.bn(self.conv(x))))


def test_function_that_fx_does_not_look_into():
    """What stands in for it while forward is traced is not what has to be there later."""
    fused, original = pair_of(CallsOpaque())
    assert_same(fused, original, X, calls=1)


class AsksClasses(Layer):
    def __init__(self):
        super().__init__()
        self.after = nn.Tanh()

    def forward(self, x):
        y = self.after(self.relu(self.bn(self.conv(x))))
        return self.asked(y)


class AsksByIsinstance(AsksClasses):
    def asked(self, y):
        return 2 * y if isinstance(self.after, nn.Tanh) else y


class AsksByType(AsksClasses):
    def asked(self, y):
        return 2 * y if type(self.after) is nn.Tanh else y


class AsksByMatching(AsksClasses):
    def asked(self, y):
        match self.after:
            case nn.Tanh():
                return 2 * y
        return y


class AsksItsItems(AsksClasses):
    def __init__(self):
        super().__init__()
        self.after = nn.Sequential(nn.Tanh())

    def asked(self, y):
        return 2 * y if any(one.__class__ is nn.Tanh for one in self.after) else y


@pytest.mark.parametrize("kind", [AsksByIsinstance, AsksByType, AsksByMatching, AsksItsItems])
def test_child_of_another_class(kind):
    """One that is only called may be replaced by another; not where forward asks of which class it is."""
    fused, original = pair_of(kind())
    assert_same(fused, original, X, calls=1)
    for model in (fused, original):
        owner, name = (model.after, "0") if isinstance(model.after, nn.Sequential) else (model, "after")
        setattr(owner, name, nn.Sigmoid())
    assert_same(fused, original, X, calls=0)
