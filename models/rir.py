"""The 18-layer Resnet in Resnet for CIFAR (Targ, Almeida and Lyman, arXiv 1603.08029), read top to bottom.

    part                               channels, wide (thin)   image
    conv3x3, BN, ReLU                  3 -> 96 (16)            32x32
    2 blocks of 2 layers               96 (16)                 32x32
    3 blocks, the first with stride 2  192 (32)                16x16
    3 blocks, the first with stride 2  384 (64)                8x8
    conv1x1 -> classes, BN, mean       classes                 -

The channels hold both streams: the first half of the stem's output is the residual stream, the other half the transient
one, and they stay packed in one tensor through the whole network.
"""

from torch import nn

import rir_kernels


class RiR(nn.Module):
    """forward(x): images (N, in_channels, H, W) of any size -> class scores (N, num_classes).

    width: packed channels of the stages; depth: blocks of each stage. `layers` is where RiRBlock and ConvBNAct are
    taken from: rir_kernels, or rir_kernels.reference for plain PyTorch; `impl` is for the former alone, and None leaves
    its default. `block_options` go to every block: shortcut, outer_shortcut, outer_streams, residual_fraction,
    num_layers (per block), ... With outer_shortcut="none" it is the paper's "ResNet Init" (inner shortcuts only); the
    wide network with "pad" shortcuts has 9,469,940 parameters at 10 classes.
    """

    def __init__(
        self,
        num_classes=10,
        *,
        in_channels=3,
        width=(96, 192, 384),
        depth=(2, 3, 3),
        layers=rir_kernels,
        impl=None,
        device=None,
        dtype=None,
        **block_options,
    ):
        super().__init__()
        if len(width) != len(depth):
            raise ValueError(f"width and depth need one entry per stage each, got {tuple(width)} and {tuple(depth)}")
        common = {"device": device, "dtype": dtype}
        if impl is not None:
            common["impl"] = impl

        self.stem = layers.ConvBNAct(in_channels, width[0], 3, **common)
        self.stages = nn.Sequential()
        channels = width[0]
        for index, (stage_width, num_blocks) in enumerate(zip(width, depth, strict=True)):
            stage = nn.Sequential()
            for block in range(num_blocks):
                stride = 2 if index > 0 and block == 0 else 1  # every stage but the first starts by halving the image
                stage.append(layers.RiRBlock(channels, stage_width, stride=stride, **common, **block_options))
                channels = stage_width
            self.stages.append(stage)
        self.head = layers.ConvBNAct(channels, num_classes, 1, activation=None, **common)

        for unit in (self.stem, self.head):  # the blocks start from He normal by themselves
            nn.init.kaiming_normal_(unit.conv.weight, nonlinearity="relu")

    def forward(self, x):
        x = self.stem(x)
        x = self.stages(x)
        x = self.head(x)
        return x.mean(dim=(2, 3))  # global average pool, whatever the image's size
