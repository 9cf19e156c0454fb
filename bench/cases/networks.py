"""The networks of "Deep Residual Learning" (arXiv 1512.03385) at 224 pixels, from units of `ConvBNAct`."""

from torch import nn

import rir_kernels as rir


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the identity, which is a 1x1 convolution where the shape changes."""

    expansion = 1

    def __init__(self, in_channels, channels, stride=1):
        super().__init__()
        self.conv1 = rir.ConvBNAct(in_channels, channels, 3, stride=stride)
        self.conv2 = rir.ConvBNAct(channels, channels, 3)
        self.downsample = _downsample(in_channels, channels, stride)

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        return self.conv2(self.conv1(x), residual=identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the channels, and the identity."""

    expansion = 4

    def __init__(self, in_channels, channels, stride=1):
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = rir.ConvBNAct(in_channels, channels, 1)
        self.conv2 = rir.ConvBNAct(channels, channels, 3, stride=stride)
        self.conv3 = rir.ConvBNAct(channels, out_channels, 1)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        return self.conv3(self.conv2(self.conv1(x)), residual=identity)


class ResNet(nn.Module):
    """Images (N, 3, 224, 224) to logits (N, 1000)."""

    def __init__(self, block, depth, num_classes=1000):
        super().__init__()
        self.stem = rir.ConvBNAct(3, 64, 7, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = nn.Sequential()
        in_channels = 64
        for stage, num_blocks in enumerate(depth):
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                self.stages.append(block(in_channels, 64 << stage, stride))
                in_channels = block.expansion * (64 << stage)
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, x):
        x = self.stages(self.pool(self.stem(x)))
        return self.head(x.mean(dim=(2, 3)))


def resnet18() -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2))


def resnet50() -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3))


def _downsample(in_channels, out_channels, stride):
    if in_channels == out_channels and stride == 1:
        return None
    return rir.ConvBNAct(in_channels, out_channels, 1, stride=stride, activation=None)
