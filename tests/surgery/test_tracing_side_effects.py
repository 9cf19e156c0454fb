"""Tracing runs forward and leaves everything unchanged; a module whose forward would change something is skipped."""

import contextlib
import copy
import gc
import weakref
from collections import deque

import pytest
import torch
from torch import nn

from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import X, settle, units_skipped
from tests.support.surgery_models import Layer, downsample, with_forward

KEPT, TABLE, CALLS, NESTED = [], {}, 0, {"inner": [[]]}


class Net(Layer):
    last, seen = None, deque()

    def __init__(self):
        super().__init__()
        self.features, self.cache, self.names = [], {"inner": {"y": []}}, set()
        self.conv.outputs = []

    def forward(self, x):
        y = self.block(x)
        self.effect(y)
        return y


def sets_on_the_class(m, y):
    Net.last = y


def deletes(m, y):
    del m.cache


def counts(m, y):
    global CALLS
    CALLS += 1


def sets_a_global(m, y):
    global LAST
    LAST = y


def to_a_closure():
    outputs = []
    return lambda m, y: outputs.append(y)


def then_fails(m, y):
    m.features.append(y)
    bool(y)


EFFECTS = {
    "appends": lambda m, y: m.features.append(y),
    "nested": lambda m, y: m.cache["inner"]["y"].append(y),
    "adds_to_a_set": lambda m, y: m.names.add("called"),
    "to_its_child": lambda m, y: m.conv.outputs.append(y),
    "of_the_class": lambda m, y: m.seen.append(y),
    "sets_on_the_class": sets_on_the_class,
    "past_setattr": lambda m, y: object.__setattr__(m, "output", y),
    "by_dict": lambda m, y: m.__dict__.__setitem__("output", y),
    "deletes": deletes,
    "to_a_global": lambda m, y: KEPT.append(y),
    "to_a_global_table": lambda m, y: TABLE.__setitem__("y", y),
    "to_a_nested_global": lambda m, y: NESTED["inner"][0].append(y),
    "counts": counts,
    "sets_a_global": sets_a_global,
    "to_a_closure": to_a_closure(),
    "then_fails": then_fails,
}


def state(model):
    cells = [copy.copy(cell.cell_contents) for cell in model.effect.__func__.__closure__ or ()]
    own = copy.deepcopy({name: value for name, value in vars(model).items() if not name.startswith("_")})
    outside = list(KEPT), dict(TABLE), copy.deepcopy(NESTED), CALLS, "LAST" in globals(), list(Net.seen), Net.last
    return own, list(model.conv.outputs), outside, cells


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("dry_run", [True, False])
def test_nothing_is_left(effect, dry_run):
    model = settle(type("Net", (Net,), {"effect": EFFECTS[effect]})())
    before = state(model)
    report = fuse_(model, dry_run=dry_run)
    assert state(model) == before and not report.replaced
    # some are refused as soon as they are read
    words = ("cannot be traced",) if effect == "then_fails" else ("changes", "reads")
    assert any(word in report.skipped[0].reason for word in words), str(report)


def test_harmless_effects():
    """Reading a container is no effect, and a hook's effects belong to the hook."""
    reads = with_forward(lambda m, x: m.block(x) * len(m.features) + len(m.cache["inner"]), Net)
    model = nn.Sequential(settle(reads()))
    model.register_forward_hook(lambda *_: KEPT.append(1))
    report = fuse_(model)
    assert not KEPT
    assert len(report.replaced) + len(units_skipped(report)) == 1


COLLECTED, FREED = [], []


def notes(*_):
    COLLECTED.append(1)


def notes_one(reference):
    FREED.append(reference)


class Short:
    """An object that is freed while forward runs; a weak reference reports it."""


class Frees(Layer):
    def forward(self, x):
        short = Short()
        reference = weakref.ref(short, notes_one)
        del short
        return self.block(x) if reference() is None else x


def test_garbage_collection_and_weak_references_are_not_the_forwards():
    """Python may collect garbage and call weak references back at any point of forward."""
    model = settle(Frees())
    thresholds = gc.get_threshold()
    gc.callbacks.append(notes)
    try:
        gc.set_threshold(1, 1, 1)
        report = fuse_(model)
    finally:
        gc.callbacks.remove(notes)
        gc.set_threshold(*thresholds)
    assert report.replaced and not report.skipped, str(report)
    assert FREED and COLLECTED and gc.isenabled()


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("not even this")


@pytest.mark.parametrize(
    "error", [KeyError, StopIteration, RecursionError, NotImplementedError, SystemExit, GeneratorExit, Unspeakable]
)
def test_a_forward_that_raises(error):
    """That module is skipped, with the kind of error; the others are not."""

    class Fails(Layer):
        def forward(self, x):
            y = self.block(x)
            if self.training:
                raise error
            return y

    model = nn.Sequential(Fails(), settle(Layer()), downsample())
    report = fuse_(model)
    assert [item.pattern for item in report.replaced] == ["conv_bn_act", "conv_bn"]
    assert any(error.__name__ in item.reason for item in report.skipped), str(report)


def caught(m, y):
    with contextlib.suppress(Exception):
        return y if y.sum() > 0 else -y
    return 2 * y


def number_caught(m, y):
    try:
        return y * float(y.sum())
    except Exception:
        return 2 * y


@pytest.mark.parametrize("effect", [caught, number_caught])
def test_a_forward_that_catches(effect):
    """A question that a placeholder cannot answer is no error of the model: forward may not take the error's branch."""
    model = settle(with_forward(lambda m, x: effect(m, m.block(x)))()).eval()
    report = fuse_(model)
    assert not report.replaced and report.skipped, str(report)
    assert torch.equal(model(X), effect(model, model.block(X)))
