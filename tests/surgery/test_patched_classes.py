"""Classes whose methods are replaced after fuse_, or before: a fused model computes what the unfused one does.

After a replacement both run the same modules one by one, so their outputs are compared bit for bit.
"""

import abc
import copy
import pickle
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels.surgery import classes, fuse_, unfuse_
from tests.support.surgery_helpers import X, fused_calls, pair_of, settle
from tests.support.surgery_models import Layer as Unit
from tests.support.surgery_models import downsample, with_forward


class Methods(Unit):
    def forward(self, x):
        return self.body(x) * self.factor

    def body(self, x):
        return super().forward(x)

    @property
    def factor(self):
        return 2.0


def pair(model):
    fused, original = pair_of(settle(model).eval(), 1)
    with fused_calls(1):
        fused(X)
    return fused, original


def unfused_and_same(fused, original):
    """Whether both give the same bits, the fused model one by one."""
    with fused_calls(0):
        return torch.equal(fused(X), original(X))


def doubled(method):
    return lambda self, *args: 2 * method(self, *args)


# methods of the class itself, methods that its forward calls, and inherited ones
PATCHES = {
    "conv": (nn.Conv2d, "forward"),
    "conv, padding": (nn.Conv2d, "_conv_forward"),
    "conv, call": (nn.Conv2d, "__call__"),
    "norm": (nn.BatchNorm2d, "forward"),
    "norm, base": (nn.modules.batchnorm._BatchNorm, "forward"),
    "relu": (nn.ReLU, "forward"),
    "unit": (Methods, "forward"),
    "unit, base": (Unit, "forward"),
    "unit, method": (Methods, "body"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_methods_replaced_on_a_class(name):
    fused, original = pair(Methods())
    plain, (kind, method) = fused(X), PATCHES[name]
    with patch.object(kind, method, doubled(getattr(kind, method))):
        for model in (fused, copy.deepcopy(fused)):
            with fused_calls(0):
                found = model(X)
            assert torch.equal(found, original(X)) and not torch.allclose(found, plain)
        assert "replaced on the class" in str(fuse_(fused).skipped) or kind.__module__.startswith("torch.")
    with fused_calls(1):
        assert torch.equal(fused(X), plain)


@pytest.mark.parametrize("name", ["conv2d", "batch_norm", "relu"])
def test_functions_that_torchs_modules_call(name):
    """If a wrapper that counts operations replaces one, it is called as often as in the unfused model."""
    fused, original = pair(Unit())
    counts = []
    for model in (fused, original):
        counted = Mock(wraps=getattr(F, name))
        with patch.object(F, name, counted), fused_calls(0):
            assert torch.equal(model(X), original(X))
        counts.append(counted.call_count)
    assert counts == [2, 2]


def test_code_that_is_reloaded():
    """Tools that reload an edited source replace the code: the function stays the same object."""
    Reloaded = with_forward(lambda self, x: self.block(x))
    fused, original = pair(Reloaded())
    Reloaded.forward.__code__ = (lambda self, x: 3 * x).__code__
    assert torch.equal(fused(X), 3 * X) and torch.equal(original(X), 3 * X)


def scaled_by(factor):
    return lambda self, x: self.block(x) * factor


def test_a_method_of_the_same_code():
    Scaled = with_forward(scaled_by(1.0))
    fused, original = pair(Scaled())
    with patch.object(Scaled, "forward", scaled_by(2.0)):
        assert unfused_and_same(fused, original)


def test_a_copy_that_is_pickled_while_a_method_is_replaced():
    """It does not take the method that it finds for the one that its program was made from."""
    fused, original = pair(Unit())
    with patch.object(Unit, "forward", lambda self, x: 3 * x):
        twin = pickle.loads(pickle.dumps(fused))
        assert torch.equal(twin(X), 3 * X)
        again = pickle.loads(pickle.dumps(twin))
    for model in (twin, again):
        torch.testing.assert_close(model(X), original(X), rtol=1e-10, atol=1e-10)  # fp64, see surgery_helpers


def test_property_replaced_on_a_class():
    fused, original = pair(Methods())
    with patch.object(Methods, "factor", property(lambda self: 3.0)):
        assert torch.equal(fused(X), original(X))
        unfuse_(fused)
        fuse_(fused)  # with the new property
        with fused_calls(1):
            assert torch.equal(fused(X), original(X))
    assert unfused_and_same(fused, original)


def test_a_replaced_class_that_tracing_looks_into():
    """The forward of a Sequential whose last norm is fused with the sum after it."""

    class Body(nn.Sequential):
        forward = nn.Sequential.forward

    model = with_forward(lambda self, x: self.relu(self.body(x) + x))()
    model.body = Body(*downsample())
    fused, original = pair(model)
    with patch.object(Body, "forward", doubled(nn.Sequential.forward)):
        assert unfused_and_same(fused, original)


class Shifted(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class Halved(nn.Identity):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize(("name", "kind"), [("Conv2d", Shifted), ("Identity", Halved)])
def test_names_of_torch_rebound_to_subclasses(monkeypatch, name, kind):
    """fuse_ compares with the classes that torch defined, not with what torch.nn has under their names later."""
    fused, original = pair(Unit())
    monkeypatch.setattr(nn, name, kind)
    with fused_calls(1):
        assert torch.equal(fused(X), original(X))
    wrong = settle(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Identity(), nn.BatchNorm2d(4), nn.ReLU())).eval()
    expected = wrong(X)
    fuse_(wrong)
    assert torch.equal(wrong(X), expected)


def test_a_class_that_was_patched_before_it_was_known():
    class Patched(nn.Conv2d):
        forward = torch.jit.unused(nn.Linear.forward)

    classes.know(Patched)
    assert "Patched.forward has been replaced" in classes.patched(Patched)
    assert not classes.patched(nn.Conv2d) and not classes.patched(Unit)


class SuperOfClass(Unit):
    def train(self, mode=True):
        super(self.__class__, self).train(mode)
        self.bn.eval()
        return self


class SuperOfType(Unit):
    @property
    def width(self):
        return super(type(self), self).__getattr__("conv").out_channels


class NoRecursion(Unit):
    def train(self, mode=True):
        super(NoRecursion, self).train(mode)  # noqa: UP008 - the form that is harmless
        self.name = self.__class__.__name__ + type(self).__name__
        return self


@pytest.mark.parametrize(("kind", "operations"), [(SuperOfClass, 0), (SuperOfType, 0), (NoRecursion, 1)])
def test_super_of_the_instances_class(kind, operations):
    model = kind()
    report = fuse_(model)
    assert len(report.replaced) == operations
    model.train()
    if not operations:
        assert type(model) is kind and "calls super() of the instance's own class" in report.skipped[0].reason
        assert model.bn.training is (kind is SuperOfType)


def build(kind, state):
    model = kind().double()
    model.load_state_dict(state)
    return model.eval()


class Reduced(Unit):
    def __reduce__(self):
        return build, (type(self), self.state_dict())


class ReducedEx(Unit):
    def __reduce_ex__(self, protocol):
        return build, (self.__class__, self.state_dict())


class Constructed(Unit):
    """Its __new__ takes an argument, which copies pass."""

    def __new__(cls, width=4):
        module = super().__new__(cls)
        object.__setattr__(module, "width", width)
        return module

    def __init__(self, width=4):
        super().__init__()

    def __getnewargs__(self):
        return (self.width,)


class DeepCopied(Unit):
    def __deepcopy__(self, memo):
        return build(type(self), self.state_dict())


@pytest.mark.parametrize("kind", [Reduced, ReducedEx, Constructed, DeepCopied])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_classes_that_say_how_they_are_copied(kind, way):
    fused, _ = pair(kind())
    expected, twin = fused(X), way(fused)
    # its __deepcopy__ makes an instance of the original class
    with fused_calls(0 if kind is DeepCopied and way is copy.deepcopy else 1):
        assert torch.equal(twin(X), expected)
    assert type(unfuse_(twin)) is kind and twin.conv.weight is not fused.conv.weight


registered = []


class Registering(type):
    def __init__(cls, name, bases, namespace):
        super().__init__(name, bases, namespace)
        registered.append(name)


class AbstractRegistering(abc.ABCMeta):
    def __new__(meta, *args):
        cls = super().__new__(meta, *args)
        registered.append(cls.__name__)
        return cls


class BySubclass(Unit):
    def __init_subclass__(cls, **options):
        registered.append(cls.__name__)


class ByMeta(Unit, metaclass=Registering):
    pass


class ByAbstractMeta(Unit, metaclass=AbstractRegistering):
    pass


@pytest.mark.parametrize("kind", [BySubclass, ByMeta, ByAbstractMeta])
def test_registries_of_subclasses_see_nothing(kind):
    before = list(registered)
    model = settle(kind())
    assert fuse_(model, dry_run=True).replaced and not kind.__subclasses__()
    fused, _ = pair(model)
    copy.deepcopy(fused)
    assert registered == before
    assert isinstance(fused, kind) and not isinstance(kind(), type(fused)) and isinstance(kind(), kind)
    type("Further", (kind,), {})
    assert registered[len(before) :] == ["Further"]
