"""fuse_ on forwards that torch.fx traces: what is found, what is refused, what is seen to change afterwards.

The tolerance is surgery_helpers'; on a CPU most of it is the same operators in the same order.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels.surgery import fuse_, unfuse_
from tests.support.surgery_helpers import assert_same, randn, settle

X = randn(2, 4, 6, 6)


def conv(**options):
    return nn.Conv2d(4, 4, 3, padding=1, bias=False, **options)


class Block(nn.Module):
    """torchvision's BasicBlock by its attributes: one ReLU in place for both."""

    def __init__(self, downsample=None):
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(4)
        self.relu, self.downsample, self.scale = nn.ReLU(inplace=True), downsample, 1.0

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        if self.scale != 1.0:
            out = self.scale * out
        out += identity
        return self.relu(out)


class PreBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4), conv()
        self.nothing = nn.Identity()

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(self.nothing(self.bn2(out)).relu_())
        return x + out


class Generalized(nn.Module):
    """One stream of a generalized residual layer: the norm sees the sum of two convolutions and the identity."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = conv(), conv(), nn.BatchNorm2d(4)

    def forward(self, r, t):
        return torch.relu(self.bn(self.a(r) + 0.5 * self.b(t) + r))


class Layer(nn.Module):
    """A convolution and a norm, for what forward does with them."""

    def __init__(self, **options):
        super().__init__()
        self.conv, self.bn, self.relu = conv(**options), nn.BatchNorm2d(4), nn.ReLU()


class Variant(Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def plain(m, x):
    return F.relu(m.bn(m.conv(x)) + x)


def in_place(m, x):
    y = m.bn(m.conv(x))
    y += x
    return F.relu(y, inplace=True)


def methods(m, x):
    return m.bn(m.conv(x)).add_(x).relu()


def identity_first(m, x):
    return torch.relu(torch.add(x, m.bn(m.conv(x))))


def scaled(m, x):
    return m.relu(x + torch.mul(m.bn(m.conv(x)), 0.25))


def no_relu(m, x):
    return x + m.bn(m.conv(x))


def of_two_convolutions(m, x):
    return m.relu(m.conv(x) + m.bn(m.conv(x)))


FOUND = {
    "P3, module": (Block(), ["conv_bn_act", "conv_bn_add_act"]),
    "P3, downsample": (
        Block(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))),
        ["conv_bn_act", "conv_bn_add_act", "conv_bn"],
    ),
    "bn_act": (PreBlock(), ["bn_act", "conv_bn_act"]),
    **{
        f"P3, {f.__name__}": (Variant(f), ["conv_bn_add_act"])
        for f in (plain, in_place, methods, identity_first, no_relu)
    },
    "conv_bn_scaled_add_act": (Variant(scaled), ["conv_bn_scaled_add_act"]),
    "one weight twice": (Variant(of_two_convolutions), ["conv_bn_add_act"]),
}


class Counting(Variant):
    """Whose forward changes buffers in place."""

    def __init__(self, function):
        super().__init__(function)
        self.register_buffer("steps", torch.zeros(4, 1, 1))


def counted(m, x):
    m.steps.add_(1)
    return m.relu(m.bn(m.conv(x))) + m.steps


def statistics_moved(m, x):
    m.bn.running_mean.add_(1)
    return m.relu(m.bn(m.conv(x)))


def counted_between(m, x):
    y = m.relu(m.bn(m.conv(x + m.steps)))
    m.steps.mul_(0.5).add_(1)
    return y * m.steps


def counted_by_an_operator(m, x):
    m.steps += 1
    return m.relu(m.bn(m.conv(x)))


WAYS = {
    "fuse_": {},
    "dry_run": {"dry_run": True},
    "refused": {"filter_fn": lambda module, name: False},
    "other patterns": {"patterns": ["conv_add_bn_act"]},
}


@pytest.mark.parametrize("function", [counted, statistics_moved, counted_between, counted_by_an_operator])
@pytest.mark.parametrize("way", WAYS)
def test_buffers_that_forward_changes(way, function):
    """Tracing runs forward, and changes nothing: each call does, fused or not."""
    torch.manual_seed(0)
    original = settle(Counting(function))
    fused = copy.deepcopy(original)
    report = fuse_(fused, **WAYS[way])
    expected = 1 if way in ("fuse_", "dry_run") and function is not counted_by_an_operator else 0
    assert len(report.replaced) == expected, str(report)
    for name, value in original.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value), name
    for _ in range(3):
        assert_same(fused, original, randn(2, 4, 5, 6), calls=expected if way == "fuse_" else 0)
    unfuse_(fused)
    assert_same(fused, original, randn(2, 4, 5, 6), calls=0)


def pair_of(model, patterns):
    torch.manual_seed(0)
    original = settle(copy.deepcopy(model))
    fused = copy.deepcopy(original)
    assert [item.pattern for item in fuse_(fused).replaced] == patterns
    return fused, original


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("training", [True, False])
def test_found(name, training):
    model, patterns = FOUND[name]
    fused, original = pair_of(model, patterns)
    for _ in range(2):
        assert_same(fused.train(training), original.train(training), X, calls=len(patterns))
    before = original.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in unfuse_(fused).state_dict().items())
    assert [type(m) for m in fused.modules()] == [type(m) for m in original.modules()]


def test_the_norm_after_the_sum():
    fused, original = pair_of(Generalized(), ["conv_add_bn_act"])
    assert_same(fused, original, X, randn(2, 4, 6, 6, seed=1))


def test_stable_resnet():
    model = Block()
    model.scale = 0.5
    fused, original = pair_of(model, ["conv_bn_act", "conv_bn_scaled_add_act"])
    assert_same(fused, original, X, calls=2)


def _remove_downsample(m):
    m.downsample = None


def _other_scale(m):
    m.scale = 3.0


def _other_relu(m):
    m.relu = nn.SiLU()


def _hook(m):
    m.bn2.register_forward_hook(lambda _module, _inputs, y: 2 * y)


def _one_in_evaluation(m):
    m.bn2.eval()


def _other_convolution(m):
    m.conv1 = nn.Conv2d(4, 4, 1).double()


def _grouped(m):
    m.conv1 = settle(conv(groups=2))


# with the fused calls that remain: the whole forward gives way to what it decides by, a chain to its own parts
LATER = {
    _remove_downsample: 0, _other_scale: 1, _other_relu: 1, _hook: 2, _one_in_evaluation: 3, _other_convolution: 3,
    _grouped: 2,
}  # fmt: skip


@pytest.mark.parametrize("change", LATER, ids=lambda f: f.__name__)
def test_changed_afterwards(change):
    fused, original = pair_of(*FOUND["P3, downsample"])
    for model in (fused, original):
        torch.manual_seed(0)
        change(model)
    assert_same(fused, original, X, calls=LATER[change])


def test_method_replaced_on_the_instance():
    class Methods(Layer):
        def forward(self, x):
            return self.norm(self.conv(x))

        def norm(self, x):
            return self.relu(self.bn(x))

    fused, original = pair_of(Methods(), ["conv_bn_act"])
    assert_same(fused, original, X, calls=1)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    compiled(X), original(X)
    for model in (fused, original):
        model.norm = torch.sigmoid
    torch.testing.assert_close(compiled(X), original(X), rtol=1e-10, atol=1e-10)
    assert_same(fused, original, X, calls=0)


def test_what_does_not_fit_runs_one_by_one():
    """A residual that is broadcast, one of another dtype, and an image without a batch."""

    class Joined(Layer):
        def forward(self, x, other):
            return self.relu(self.bn(self.conv(x)) + other)

    fused, original = pair_of(Joined(), ["conv_bn_add_act"])
    assert_same(fused, original, X, X, calls=1)
    assert_same(fused, original, X, randn(2, 4, 1, 1), calls=0)
    for model in (fused, original):
        model.float()
    mixed = fused(X.float(), X)
    assert mixed.dtype == torch.float64 and torch.equal(mixed, original(X.float(), X))
    with pytest.raises(ValueError, match="expected 4D"):
        fused(X[0].float(), X[0].float())


def test_arguments_as_they_come():
    class Optional(Layer):
        def forward(self, x, scale=1.0, *, shift=None):
            y = self.relu(self.bn(self.conv(x))) * scale
            return y if shift is None else y + shift

    fused, original = pair_of(Optional(), ["conv_bn_act"])
    assert_same(fused, original, X, calls=1)
    for given in ({"x": X}, {"x": X, "scale": 2.0}, {"x": X, "shift": 1.0}):
        torch.testing.assert_close(fused(**given), original(**given), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fused(X, 3.0), original(X, 3.0), rtol=1e-10, atol=1e-10)


def test_borders_are_crossed_where_they_must_be():
    """The ReLU behind a Sequential's last norm; what else is in there keeps to itself."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4))
            self.beside = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            return F.relu(self.body(x) + self.beside(x))

    fused, original = pair_of(Body(), ["conv_bn_act", "conv_bn_add_act", "conv_bn_act"])
    assert type(fused.body) is nn.Sequential and type(fused.beside) is not nn.Sequential
    assert_same(fused, original, X, calls=3)
    for model in (fused, original):
        model.body.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    assert_same(fused, original, X, calls=1)
