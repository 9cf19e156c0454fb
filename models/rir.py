"""The four 18-layer networks of "Resnet in Resnet" (Targ, Almeida and Lyman, arXiv 1603.08029), read top to bottom.

    part                               channels, wide (thin)   image
    conv3x3, BN, ReLU                  3 -> 96 (16)            32x32
    2 blocks of 2 layers               96 (16)                 32x32
    3 blocks, the first with stride 2  192 (32)                16x16
    3 blocks, the first with stride 2  384 (64)                8x8
    conv1x1 -> classes, BN, mean       classes                 -

They differ in two switches: whether a shortcut goes around every layer (inner), and around every block (outer).

                   outer_shortcut=False   outer_shortcut=True
    inner False    CNN                    ResNet (arXiv 1512.03385)
    inner True     ResNet Init            RiR

With inner shortcuts the channels hold two streams: the first half is the residual stream, the other half the transient
one, and they stay packed in one tensor through the whole network. Without, one stream has all the channels.
"""

from torch import nn

import rir_kernels
from rir_kernels.common.arguments import check_choice, check_positive_int

from . import siblings

WIDE = (96, 192, 384)
THIN = (16, 32, 64)
VARIANTS = {(False, False): "CNN", (False, True): "ResNet", (True, False): "ResNet Init", (True, True): "RiR"}
BLOCK_OPTIONS = {
    "CNN": (),
    "ResNet": (),
    "ResNet Init": ("residual_fraction",),
    "RiR": ("residual_fraction", "outer_at", "outer_streams"),
}


class RiR(nn.Module):
    """forward(x): images (N, in_channels, H, W) of any size -> class scores (N, num_classes).

    width: channels of the stages, both streams together; depth: blocks of each stage; layers_per_block: 2 is the
    paper's, 1 and 3 are the shortcut depths of arXiv 1611.01186. shortcut, where the shape changes: "pad" (every second
    pixel, the new channels get nothing: option A of arXiv 1512.03385) or "projection" (conv1x1 without bias or norm).
    head: "conv" (the paper's) or "linear" (global average pool, then nn.Linear). `layers` is where RiRBlock and
    ConvBNAct are taken from: rir_kernels, or rir_kernels.reference for plain PyTorch; `impl` is for the former alone,
    and None leaves its default. branch_scaling, zero_init_gamma and init_scale: see models/siblings.py.

    block_options, with inner shortcuts: residual_fraction (of the channels, 0.5); for RiR alone also outer_at
    ("pre_norm": the outer shortcut joins the last layer's sum; "post_act": it is added after the last ReLU) and
    outer_streams ("residual", "both").

    The four wide networks with "pad" shortcuts have 9,469,940 parameters each at 10 classes. ValueError for arguments
    out of range, and for those that the chosen network has no use for.
    """

    def __init__(
        self,
        num_classes=10,
        *,
        in_channels=3,
        inner_shortcut=True,
        outer_shortcut=True,
        width=WIDE,
        depth=(2, 3, 3),
        layers_per_block=2,
        shortcut="pad",
        head="conv",
        branch_scaling=None,
        zero_init_gamma=False,
        init_scale=1.0,
        layers=rir_kernels,
        impl=None,
        device=None,
        dtype=None,
        **block_options,
    ):
        super().__init__()
        self.variant = _check_variant(inner_shortcut, outer_shortcut, shortcut, block_options)
        check_positive_int("num_classes", num_classes)
        check_positive_int("layers_per_block", layers_per_block)
        check_choice("head", head, ("conv", "linear"))
        siblings.check(self.variant, branch_scaling, zero_init_gamma, init_scale)
        if len(width) != len(depth) or not len(width):
            raise ValueError(f"width and depth need one entry per stage each, got {tuple(width)} and {tuple(depth)}")
        if not all(isinstance(blocks, int) and blocks >= 0 for blocks in depth):
            raise ValueError(f"depth must have a number of blocks for each stage, 0 or more, got {tuple(depth)}")
        factory = {"device": device, "dtype": dtype}
        common = factory if impl is None else factory | {"impl": impl}
        outer_at = block_options.pop("outer_at", "pre_norm") if outer_shortcut else "none"

        def block(in_channels, out_channels, stride):
            common_to_both = {"num_layers": layers_per_block, "stride": stride} | common
            if inner_shortcut:
                options = {"shortcut": shortcut, "outer_shortcut": outer_at} | block_options
                return layers.RiRBlock(in_channels, out_channels, **options, **common_to_both)
            kind = shortcut if outer_shortcut else "none"
            return PlainBlock(in_channels, out_channels, unit=layers.ConvBNAct, shortcut=kind, **common_to_both)

        self.stem = layers.ConvBNAct(in_channels, width[0], 3, **common)
        self.stages = nn.Sequential()
        channels = width[0]
        for index, (stage_width, num_blocks) in enumerate(zip(width, depth, strict=True)):
            stage = nn.Sequential()
            for number in range(num_blocks):
                stride = 2 if index > 0 and number == 0 else 1  # every stage but the first starts by halving the image
                stage.append(block(channels, stage_width, stride))
                channels = stage_width
            self.stages.append(stage)
        if head == "conv":
            self.head = layers.ConvBNAct(channels, num_classes, 1, activation=None, **common)
        else:
            self.head = nn.Linear(channels, num_classes, **factory)  # starts as torch's own

        for unit in (self.stem, self.head):  # the blocks start from He normal by themselves
            if unit is not self.head or head == "conv":
                nn.init.kaiming_normal_(unit.conv.weight, nonlinearity="relu")
        siblings.apply(self, branch_scaling, zero_init_gamma, init_scale)

    def forward(self, x):
        x = self.stem(x)
        x = self.stages(x)
        if isinstance(self.head, nn.Linear):
            return self.head(x.mean(dim=(2, 3)))
        return self.head(x).mean(dim=(2, 3))  # global average pool, whatever the image's size

    def blocks(self):
        """The blocks of all stages, in order: each has `layers`."""
        return [block for stage in self.stages for block in stage]

    def extra_repr(self):
        return self.variant


class PlainBlock(nn.Module):
    """conv, BN, ReLU, `num_layers` times, the stride in the first: a block of a CNN or, with a shortcut, of a ResNet.

    forward(x): (N, in_channels, H, W) -> (N, out_channels, H', W'). shortcut: "none", or "pad" or "projection", which
    joins after the last norm and before the last ReLU. Source: He et al., arXiv 1512.03385, section 3.
    `unit` makes a layer (ConvBNAct of rir_kernels or of its reference), and is handed the `unit_options`.
    """

    def __init__(self, in_channels, out_channels, *, unit, num_layers, stride, shortcut, **unit_options):
        super().__init__()
        self.stride, self.shortcut = stride, shortcut
        self.layers = nn.ModuleList([unit(in_channels, out_channels, 3, stride=stride, **unit_options)])
        self.layers.extend(unit(out_channels, out_channels, 3, **unit_options) for _ in range(num_layers - 1))
        self.projection = None
        if shortcut == "projection" and (stride != 1 or in_channels != out_channels):
            factory = {name: unit_options[name] for name in ("device", "dtype")}
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **factory)
            nn.init.kaiming_normal_(self.projection.weight, nonlinearity="relu")
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.conv.weight, nonlinearity="relu")

    def forward(self, x):
        shortcut = None
        if self.projection is not None:
            shortcut = self.projection(x)
        elif self.shortcut != "none":
            # a residual may have fewer channels than what it joins: no zeros are made for the new ones
            out_channels = self.layers[-1].conv.out_channels
            shortcut = x[:, :out_channels, :: self.stride, :: self.stride]
        for layer in self.layers[:-1]:
            x = layer(x)
        return self.layers[-1](x, residual=shortcut)

    def extra_repr(self):
        return f"stride={self.stride}, shortcut={self.shortcut!r}"


def _check_variant(inner_shortcut, outer_shortcut, shortcut, block_options):
    """The network's name in the paper. ValueError for what that network has no use for."""
    for name, value in (("inner_shortcut", inner_shortcut), ("outer_shortcut", outer_shortcut)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r} (where an outer one joins: outer_at)")
    variant = VARIANTS[inner_shortcut, outer_shortcut]
    check_choice("shortcut", shortcut, ("pad", "projection"))
    if variant == "CNN" and shortcut != "pad":
        raise ValueError(f"a CNN has no shortcuts, got shortcut={shortcut!r}: leave it out")
    refused = [name for name in block_options if name not in BLOCK_OPTIONS[variant]]
    if refused:
        taken = ", ".join(BLOCK_OPTIONS[variant]) or "none"
        raise ValueError(f"{variant} takes no option {', '.join(refused)}; block options that it takes: {taken}")
    check_choice("outer_at", block_options.get("outer_at", "pre_norm"), ("pre_norm", "post_act"))
    return variant
