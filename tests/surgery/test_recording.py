"""While it traces, fuse_ changes the classes of the modules to record their attribute reads, and always restores them.

nn.Module itself is not changed: each change of a class empties Python's caches of all its subclasses, so it would cost
time for every subclass of nn.Module in the process.
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
from tests.support.surgery_helpers import X, assert_same, pair_of, settle, units_skipped
from tests.support.surgery_models import Block, Layer, downsample, with_forward
from tests.surgery.test_trace_reuse import traced as traced_modules

OF_MODULES = {name: getattr(nn.Module, name) for name in ("__getattribute__", "__getattr__", "__setattr__", "__call__")}


class Calls(Layer):
    """Its forward calls its method `first` before anything else."""

    def __init__(self):
        super().__init__()
        self.body = downsample()

    def forward(self, x):
        self.first()
        return self.body(self.block(x))


def calls(first):
    return type("Calls", (Calls,), {"first": first})()


def nothing(module):
    pass


def untouched(model):
    """Whether no class has another attribute look-up than before."""
    return not any("__getattribute__" in vars(kind) for module in model.modules() for kind in type(module).__mro__[:-1])


def looks_at_modules(module):
    for name, method in OF_MODULES.items():
        if getattr(nn.Module, name) is not method:
            raise ValueError(name)
    if object.__getattribute__(type(module), "__getattribute__") is OF_MODULES["__getattribute__"]:
        raise ValueError("nothing is recorded")


def test_nn_module_is_not_changed():
    """The check runs within a forward that is traced."""
    report = fuse_(calls(looks_at_modules))
    assert len(report.replaced) == 2, str(report)


class Kinds(set):
    added = 0

    def add(self, kind):
        Kinds.added += kind not in self
        super().add(kind)


@pytest.mark.parametrize("blocks", [1, 12])
def test_work_grows_with_kinds_of_blocks_only(blocks, monkeypatch):
    """The number of classes that change and of forwards that are traced does not depend on the number of blocks."""
    modules, changed = traced_modules(monkeypatch), Kinds()
    monkeypatch.setattr(recording, "_changed", changed)
    monkeypatch.setattr(Kinds, "added", 0)
    report = fuse_(nn.Sequential(nn.Sequential(*(Block() for _ in range(blocks)))))
    assert len(report.replaced) == 2 * blocks and modules.count(Block) == 1
    # the classes within a Block; the others were traced before, or have no norm within reach
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
    model = nn.Sequential(calls(first), Block())
    assert len(units_skipped(fuse_(model))) == 1 and untouched(model)


def test_restored_after_an_interruption():
    model = nn.Sequential(Block(), calls(interrupts))
    with pytest.raises(KeyboardInterrupt):
        fuse_(model)
    assert untouched(model) and type(model[0]) is Block


def test_restored_after_an_error_of_the_filter():
    """fuse_ calls the filter between the traces."""
    model = nn.Sequential(Block(), Block())
    with pytest.raises(ZeroDivisionError):
        fuse_(model, filter_fn=lambda module, name: 1 / 0)
    assert untouched(model)


def test_fused_within_a_filter():
    other, model = Block(), nn.Sequential(Block(), calls(nothing))
    report = fuse_(model, filter_fn=lambda module, name: bool(fuse_(unfuse_(other)).replaced))
    assert len(report.replaced) == 4 and untouched(model) and untouched(unfuse_(other))


def fuses_and_catches(module):
    with contextlib.suppress(BaseException):  # as a bare except does
        fuse_(module.body)


FUSES = {
    "fuses": lambda module: fuse_(module.body),
    "only looks": lambda module: fuse_(module.body, dry_run=True),
    "folds": lambda module: fold_bn_(module.body, dry_run=True),
    "fuses and catches": fuses_and_catches,
}


@pytest.mark.parametrize("first", FUSES)
def test_fused_within_a_forward(first):
    """That forward is not fused, nor what it would have fused."""
    model = calls(FUSES[first])
    report = fuse_(model)
    assert [item.reason for item in units_skipped(report)] == ["its forward fuses or folds a model"]
    assert [item.name for item in report.replaced] == ["body"] and untouched(unfuse_(model))
    assert type(model.body[1]) is nn.BatchNorm2d and model.body.training


def sets_and_catches(module):
    with contextlib.suppress(BaseException):
        module.calls = 1


OTHER = nn.Conv2d(4, 4, 1).double()


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (sets_and_catches, "sets the attribute 'calls'"),
        (lambda module: OTHER(None), "none of its children"),
        (lambda module: module if is_fx_tracing() else None, "is_fx_tracing"),
    ],
)
def test_refused(first, reason):
    report = fuse_(calls(first))
    assert [item.name for item in report.replaced] == ["body"] and reason in report.skipped[0].reason, str(report)


def test_torch_sees_that_fx_traces(monkeypatch):
    """From 2.14 on torch has a context for it and no global."""
    told = []

    @contextlib.contextmanager
    def context(value):
        told.append(value)
        yield
        told.append("before")

    monkeypatch.setattr(_symbolic_trace, "_is_fx_tracing_context", context, raising=False)
    monkeypatch.delattr(_symbolic_trace, "_is_fx_tracing_flag", raising=False)
    assert "conv_bn_act" in [item.pattern for item in fuse_(calls(nothing)).replaced]
    assert told[:2] == [True, "before"]


def test_class_with_its_own_getattribute():
    class Doubling(nn.Identity):
        def __getattribute__(self, name):
            return 2 if name == "factor" else super().__getattribute__(name)

    model = calls(nothing)
    model.doubling = Doubling()
    report = fuse_(model)
    assert [item.name for item in report.replaced] == ["body"] and "__getattribute__" in report.skipped[0].reason
    assert model.doubling.factor == 2 and "__getattribute__" in vars(Doubling)


def test_another_thread_runs_another_model():
    """It has the same classes and runs while this thread traces."""
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


def test_function_that_fx_does_not_look_into():
    """What replaces the function while forward is traced need not be there in later calls."""
    model = with_forward(lambda self, x: opaque(self.block(x)))()
    assert_same(*pair_of(settle(model).eval(), ["conv_bn_act"]), X, calls=1)
