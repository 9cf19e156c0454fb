"""Tracing runs forward and leaves everything unchanged: what forward would change makes the module be skipped."""

import contextlib
import copy
import gc
import weakref
from collections import deque

import pytest
import torch
from torch import nn

from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import randn, settle, units_skipped
from tests.surgery.test_fx_traced import Layer

X = randn(2, 4, 6, 6)
KEPT, TABLE, CALLS, NESTED = [], {}, 0, {"inner": [[]]}


class Net(Layer):
    last, seen = None, deque()

    def __init__(self, effect):
        super().__init__()
        self.features, self.cache, self.names = [], {"inner": {"y": []}}, set()
        self.conv.outputs = []
        self.effect = effect

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return self.effect(self, y)


def appends(m, y):
    m.features.append(y)
    return y


def nested(m, y):
    m.cache["inner"]["y"].append(y)
    return y


def adds_to_a_set(m, y):
    m.names.add("called")
    return y


def to_its_child(m, y):
    m.conv.outputs.append(y)
    return y


def of_the_class(m, y):
    m.seen.append(y)
    return y


def sets_on_the_class(m, y):
    Net.last = y
    return y


def past_setattr(m, y):
    object.__setattr__(m, "output", y)
    return y


def by_dict(m, y):
    m.__dict__["output"] = y
    return y


def deletes(m, y):
    del m.cache
    return y


def to_a_global(m, y):
    KEPT.append(y)
    return y


def to_a_global_table(m, y):
    TABLE["y"] = y
    return y


def to_a_nested_global(m, y):
    NESTED["inner"][0].append(y)
    return y


def counts(m, y):
    global CALLS
    CALLS += 1
    return y


def sets_a_global(m, y):
    global LAST
    LAST = y
    return y


def to_a_closure():
    outputs = []

    def effect(m, y):
        outputs.append(y)
        return y

    return effect


def then_fails(m, y):
    m.features.append(y)
    return bool(y)


EFFECTS = (
    appends, nested, adds_to_a_set, to_its_child, of_the_class, sets_on_the_class, past_setattr, by_dict, deletes,
    to_a_global, to_a_global_table, to_a_nested_global, counts, sets_a_global, to_a_closure(),
)  # fmt: skip


def state(model):
    cells = [copy.copy(cell.cell_contents) for cell in model.effect.__closure__ or ()]
    own = copy.deepcopy({name: value for name, value in vars(model).items() if not name.startswith("_")})
    outside = list(KEPT), dict(TABLE), copy.deepcopy(NESTED), CALLS, "LAST" in globals(), list(Net.seen), Net.last
    return own, list(model.conv.outputs), outside, cells


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dry_run", [True, False])
def test_nothing_is_left(effect, dry_run):
    model = settle(Net(effect))
    before = state(model)
    report = fuse_(model, dry_run=dry_run)
    assert state(model) == before
    # some are refused as soon as they are read
    assert not report.replaced and any(word in report.skipped[0].reason for word in ("changes", "reads")), str(report)


def test_nothing_is_left_by_a_forward_that_fails():
    model = settle(Net(then_fails))
    before = state(model)
    assert fuse_(model).skipped and state(model) == before


def test_what_others_do_is_not_in_the_way():
    """Reading a container is no effect; a hook's are its own."""
    model = nn.Sequential(settle(Net(lambda m, y: y * len(m.features) + len(m.cache["inner"]))))
    model.register_forward_hook(lambda *_: KEPT.append(1))
    assert not KEPT
    report = fuse_(model)
    assert len(report.replaced) + len(units_skipped(report)) == 1


COLLECTED, FREED = [], []


def notes(*_):
    COLLECTED.append(1)


def notes_one(reference):
    FREED.append(reference)


class Short:
    """Freed as soon as forward is through with it, of which a weak reference tells."""


class Frees(Layer):
    def forward(self, x):
        short = Short()
        reference = weakref.ref(short, notes_one)
        del short
        return self.relu(self.bn(self.conv(x))) if reference() is None else x


def test_what_python_does_meanwhile_is_not_the_forwards():
    """Garbage is collected, and weak references tell of what is freed, wherever forward is at that moment."""
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


class Fails(Layer):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        if self.training:
            raise self.error()
        return y


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("not even this")


@pytest.mark.parametrize(
    "error", [KeyError, StopIteration, RecursionError, NotImplementedError, SystemExit, GeneratorExit, Unspeakable]
)
def test_a_forward_that_raises(error):
    """That module is skipped, with the kind of error; the others are not."""
    model = nn.Sequential(Fails(error), settle(Layer()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    report = fuse_(model)
    assert [item.pattern for item in report.replaced] == ["conv_bn"]
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
    """What a placeholder cannot answer is no error of the model's: it may not take the way of one."""
    model = settle(Net(effect)).eval()
    report = fuse_(model)
    assert not report.replaced and report.skipped, str(report)
    y = model.relu(model.bn(model.conv(X)))
    assert torch.equal(model(X), effect(model, y))
