"""Small models for the tests of fuse_: a layer with any forward, and blocks that torch.fx traces."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(bias=False, **options):
    return nn.Conv2d(4, 4, 3, padding=1, bias=bias, **options)


class Layer(nn.Module):
    """A convolution, a norm and a ReLU, for what a subclass's forward does with them."""

    def __init__(self, **options):
        super().__init__()
        self.conv, self.bn, self.relu = conv(**options), nn.BatchNorm2d(4), nn.ReLU()

    def block(self, x):
        return self.relu(self.bn(self.conv(x)))

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def with_forward(forward, base=Layer, **attributes):
    """A subclass with this forward: torch.fx sees the function's arguments."""
    return type(forward.__name__, (base,), {"forward": forward, "__module__": forward.__module__} | attributes)


class Opaque(nn.Sequential):
    """A Sequential that tracing does not look into, because its class has another forward."""

    def forward(self, x):
        return super().forward(x)


class Variant(Layer):
    """Its forward is an attribute."""

    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def scaled(m, x):
    return m.relu(x + torch.mul(m.bn(m.conv(x)), 0.25))


class Block(nn.Module):
    """torchvision's BasicBlock by its attributes: one in-place ReLU serves both activations."""

    def __init__(self, downsample=None, scale=1.0):
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(4)
        self.relu, self.downsample, self.scale = nn.ReLU(inplace=True), downsample, scale

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


def downsample():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def unit():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())


class PreBlock(nn.Module):
    """A pre-activation block."""

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
