"""Blocks with the attribute names of well-known ones that do something else: none may be fused to what it is not.

Each is compared in training and in evaluation with itself before; how much of it may be fused stands beside it.
"""

import copy
from collections import OrderedDict, defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import assert_same, fused_calls, randn, settle

X = randn(2, 4, 6, 6)


class BasicBlock(nn.Module):
    """The ordinary one, P1 and P3: what the others imitate."""

    fused = ("conv_bn_act", "conv_bn_add_act")

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class GroupNormed(BasicBlock):
    fused = ("conv_bn_add_act",)

    def __init__(self):
        super().__init__()
        self.bn1 = nn.GroupNorm(2, 4)


class InstanceNormed(BasicBlock):
    fused = ("conv_bn_act",)

    def __init__(self):
        super().__init__()
        self.bn2 = nn.InstanceNorm2d(4, affine=True)


class CalledTwice(BasicBlock):
    """One convolution, two norms: weights are shared, which the operation may do."""

    fused = ("conv_bn_act", "conv_bn_add_act")

    def forward(self, x):
        out = self.relu(self.bn1(self.conv2(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


class NormCalledTwice(BasicBlock):
    """Statistics are updated twice a forward."""

    fused = ()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn1(self.conv2(out)) + x)


class ScaledByTensor(BasicBlock):
    fused = ("conv_bn_act", "conv_bn")

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) * self.gate + x)


class ResidualScaled(BasicBlock):
    """relu(norm + 0.5 x): the residual is a value like any other."""

    fused = ("conv_bn_act", "conv_bn_add_act")

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + 0.5 * x)


class Subtracted(BasicBlock):
    fused = ("conv_bn_act", "conv_bn")

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out -= x
        return self.relu(out)


class AddedWithAlpha(BasicBlock):
    fused = ("conv_bn_act", "conv_bn")

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(torch.add(self.bn2(self.conv2(out)), x, alpha=2))


class IntoTheIdentity(BasicBlock):
    """The identity takes the sum, and is seen afterwards."""

    fused = ("conv_bn_act", "conv_bn")

    def forward(self, x):
        identity = seen = x.clone()
        out = self.relu(self.bn1(self.conv1(x)))
        identity += self.bn2(self.conv2(out))
        return F.relu(identity) + seen


class SharedInPlace(BasicBlock):
    """What is added later on is what the ReLU has left of it."""

    fused = ("conv_bn", "conv_bn_add_act")

    def forward(self, x):
        normed = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(self.relu(normed)))
        return out + normed


class IdentityOverwritten(BasicBlock):
    """The identity changes between the norm and the sum: the fused operation comes after that, too."""

    fused = ("conv_bn_act", "conv_bn_add_act")

    def forward(self, x):
        identity = x.clone()
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity.mul_(2)
        return self.relu(out + identity)


class Doubled(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class ChildOverwrites(BasicBlock):
    """The residual is overwritten in a forward that is not seen, before the ReLU."""

    fused = ("conv_bn_act",)

    def __init__(self):
        super().__init__()
        self.downsample = Doubled()

    def forward(self, x):
        identity = x.clone()
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = out + identity
        doubled = self.downsample(identity)
        return self.relu(out) + doubled


class ActivationBetween(BasicBlock):
    fused = ()

    def forward(self, x):
        out = self.bn1(self.relu(self.conv1(x)))
        return self.bn2(torch.tanh(self.conv2(out))) + x


class LeakyRelu(BasicBlock):
    fused = ("conv_bn", "conv_bn_add_act")

    def __init__(self):
        super().__init__()
        self.relu = nn.LeakyReLU(0.2)


class ReluSix(BasicBlock):
    fused = ("conv_bn", "conv_bn_add_act")

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6()


class ConvolutionUsedTwice(BasicBlock):
    """What enters the norm is returned too."""

    fused = ("conv_bn_act", "bn_act")

    def forward(self, x):
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(out)) + out


class NormUsedTwice(BasicBlock):
    fused = ("conv_bn_act", "conv_bn")

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out) + out


class AddedToItself(BasicBlock):
    fused = ("conv_bn_act", "conv_bn")

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + out)


class DroppedBetween(BasicBlock):
    fused = ("conv_bn_act",)

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.drop(self.conv2(out))) + x)


class BroadcastResidual(BasicBlock):
    """Fused, but each call sees a residual of another shape, and adds as torch does."""

    fused = ("conv_bn_act", "conv_bn_add_act")
    calls = 1

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x.mean((2, 3), keepdim=True))


class FunctionalNorm(BasicBlock):
    """bn2 is there but its statistics are not used."""

    fused = ("conv_bn_act",)

    def forward(self, x):
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.relu(F.batch_norm(out, None, None, self.bn2.weight, self.bn2.bias, True) + x)


class ModeDependent(BasicBlock):
    fused = ()

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + x) if self.training else self.relu(out)


def _all(kind):
    return [kind, *(found for sub in kind.__subclasses__() for found in _all(sub))]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", _all(BasicBlock))
def test_imitations(kind, training):
    torch.manual_seed(0)
    original = settle(kind()).train(training)
    fused = copy.deepcopy(original)
    report = fuse_(fused)
    assert tuple(item.pattern for item in report.replaced) == kind.fused
    torch.manual_seed(0)
    state = torch.get_rng_state()

    def again(module, _inputs):
        torch.set_rng_state(state)  # both drop alike

    for module in (original, fused):
        module.register_forward_pre_hook(again)
    assert_same(fused, original, X, calls=getattr(kind, "calls", len(kind.fused)))


@pytest.mark.parametrize("name", ["conv1", "bn1", "relu"])
def test_children_shared_between_blocks(name):
    """Two blocks with one convolution, norm or ReLU between them are what they were."""
    torch.manual_seed(0)
    original = settle(nn.Sequential(BasicBlock(), BasicBlock()))
    setattr(original[1], name, getattr(original[0], name))
    fused = copy.deepcopy(original)
    report = fuse_(fused)
    assert_same(fused, original, X, calls=len(report.replaced))
    assert getattr(fused[0], name) is getattr(fused[1], name)


class Stem(nn.Module):
    """One operation, returned in what `packed` makes of it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.names = {"out": "features"}

    def forward(self, x):
        return self.packed(self.relu(self.bn1(self.conv1(x))))


class Ordered(Stem):
    def packed(self, y):
        return OrderedDict({self.names["out"]: y})


class Defaulting(Stem):
    def packed(self, y):
        found = defaultdict(list)
        found["features"] = y
        return found


class Counting(Stem):
    """A number that has two names, one of which is counted up."""

    def packed(self, y):
        rows = wanted = y.shape[2]
        wanted += 1
        return {"features": y, "rows": rows, "wanted": wanted}


@pytest.mark.parametrize(("kind", "operations"), [(Ordered, 1), (Defaulting, 0), (Counting, 1)])
def test_results_keep_their_type(kind, operations):
    original = settle(kind()).eval()
    fused = copy.deepcopy(original)
    assert len(fuse_(fused).replaced) == operations
    found, expected = fused(X), original(X)
    assert type(found) is type(expected) and list(found) == list(expected)
    torch.testing.assert_close(dict(found), dict(expected))
    if kind is Ordered:
        fused.names["out"] = "other"
        with fused_calls(0):
            assert list(fused(X)) == ["other"]


class OneConvolution(nn.Module):
    """The shortcut of a block with one convolution overwrites what that reads; only without gradients is it allowed."""

    def __init__(self, shortcut):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.downsample = shortcut

    def forward(self, x):
        x = x.clone()
        out = self.bn1(self.conv1(x))
        return self.relu(out + self.downsample(x))


@pytest.mark.parametrize(("shortcut", "operations"), [(Doubled(), 0), (nn.MaxPool2d(1), 1)])
def test_shortcut_of_one_convolution(shortcut, operations):
    original = settle(OneConvolution(shortcut)).eval()
    fused = copy.deepcopy(original)
    assert len(fuse_(fused).replaced) == operations
    with torch.no_grad():
        torch.testing.assert_close(fused(X), original(X))
