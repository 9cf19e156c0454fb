"""Networks to be good citizens with: torchvision's ResNets, thin, blocks of pytorchcv, and our own modules.

None of them is ours to change: attributes have torchvision's names, and one in-place ReLU serves a whole block.
"""

import copy
import functools

import pytest
import torch
from torch import nn

import rir_kernels as rir
from tests.support.surgery_helpers import settle


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class OutOfPlaceBlock(BasicBlock):
    """As BasicBlock, for what torch refuses where something works in place: full backward hooks."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.relu.inplace = False

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 2  # torchvision's is 4

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """(N, 3, 8, 8) -> (N, 5)."""

    def __init__(self, block=BasicBlock, planes=(8, 16)):
        super().__init__()
        self.inplanes = planes[0]
        self.conv1 = nn.Conv2d(3, planes[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.relu = nn.ReLU(inplace=block is not OutOfPlaceBlock)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(block, planes[0])
        self.layer2 = self._make_layer(block, planes[1], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[1] * block.expansion, 5)

    def _make_layer(self, block, planes, stride=1):
        downsample, out = None, planes * block.expansion
        if stride != 1 or self.inplanes != out:
            downsample = nn.Sequential(nn.Conv2d(self.inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        layer = nn.Sequential(block(self.inplanes, planes, stride, downsample))
        self.inplanes = out
        return layer

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


OPERATIONS = 6  # of a ResNet of BasicBlocks: the stem, two of each block, one downsample


def resnet(block=BasicBlock):
    torch.manual_seed(0)
    return settle(ResNet(block))


def twins(model):
    """(fused, original) with the same values."""
    fused = copy.deepcopy(model)
    report = rir.fuse_(fused)
    assert report.replaced and all("no norm behind it" in item.reason for item in report.skipped), report
    return fused, model


@functools.cache
def _resnets(block):
    return twins(resnet(block))


def resnet_twins(block=BasicBlock):
    """twins(resnet(block)), without tracing it every time."""
    return copy.deepcopy(_resnets(block))


def images(batch=4, dtype=torch.float64, seed=0):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _pytorchcv(module, name, *args, **options):
    kind = getattr(pytest.importorskip(f"pytorchcv.models.{module}"), name)
    return kind(*args, **options)


CALLS = {"ResUnit": 2, "PreResUnit": 2, "RiRUnit": 1, "RiRBlock": 2, "ConvBNAct": 1}  # fused operations of a block
# what takes and returns an image of 4 channels; values: how it is made
BLOCKS = {
    "ResUnit": lambda: _pytorchcv("resnet", "ResUnit", 4, 4, stride=1, bottleneck=False),
    "PreResUnit": lambda: _pytorchcv("preresnet", "PreResUnit", 4, 4, stride=1, bottleneck=False),
    "RiRUnit": lambda: _Streams(_pytorchcv("rir_cifar", "RiRUnit", 2, 2, stride=1)),
    "RiRBlock": lambda: rir.RiRBlock(4, 4),
    "ConvBNAct": lambda: rir.ConvBNAct(4, 4, 3, bias=True),
}


class _Streams(nn.Module):
    def __init__(self, unit):
        super().__init__()
        self.unit = unit

    def forward(self, x):
        return torch.cat(self.unit(x[:, :2], x[:, 2:]), dim=1)
