"""What the siblings of Resnet in Resnet do differently: branches that are scaled, and weights that start small.

branch_scaling, "Stable ResNet" (Hayou et al., arXiv 2010.12859): what a shortcut joins is multiplied by a constant, the
shortcut is not. With L such sums, the l-th from 1 on:

    "uniform"      lambda   = 1 / sqrt(L)
    "decreasing"   lambda_l = 1 / (sqrt(l) * ln(l + 1))

In a ResNet the sums are the blocks': y = relu(lambda * bn(conv) + shortcut). With inner shortcuts they are the layers':
y = relu(bn(lambda * conv + shortcut)); an outer shortcut joins unscaled as well. The transient stream has no shortcut,
so its norm takes the scale out again.

Small initial weights ("Demystifying ResNet", Li et al., arXiv 1611.01186): init_scale multiplies the initial weights of
the blocks' 3x3 convolutions, not of projections. It acts where a norm sees convolution and shortcut together (inner
shortcuts); a norm of the convolution alone takes it out again, and there zero_init_gamma does the same work: the weight
of every block's last norm starts at 0, and the block as its shortcut.
"""

import math

import torch
from torch import nn

from rir_kernels.common.arguments import check_choice

BRANCH_SCALINGS = (None, "uniform", "decreasing")


def branch_scale(scaling, index, count):
    """lambda of the sum `index`, from 1 to `count`. Source: arXiv 2010.12859."""
    return 1 / math.sqrt(count) if scaling == "uniform" else 1 / (math.sqrt(index) * math.log(index + 1))


def check(variant, branch_scaling, zero_init_gamma, init_scale):
    """ValueError for what is out of range, or of no use to the network `variant`."""
    check_choice("branch_scaling", branch_scaling, BRANCH_SCALINGS)
    if branch_scaling is not None and variant == "CNN":
        raise ValueError(f"a CNN has no shortcuts, so no branches to scale, got branch_scaling={branch_scaling!r}")
    if zero_init_gamma and variant == "CNN":
        raise ValueError("a CNN has no shortcuts: zero_init_gamma would leave nothing of its blocks, leave it out")
    if zero_init_gamma and variant != "ResNet":
        raise ValueError(
            f"zero_init_gamma is for a ResNet, got it for {variant}: its norms see the sum, so that a zero weight "
            "would cut the shortcut too; init_scale makes the convolutions small instead"
        )
    if not 0 < init_scale < math.inf:
        raise ValueError(f"init_scale must be a positive number, got {init_scale!r}: 1.0 is He normal")


def apply(network, branch_scaling, zero_init_gamma, init_scale):
    """Set the constants and the initial values of a network as it comes from its constructor."""
    blocks = network.blocks()
    layers = [layer for block in blocks for layer in block.layers]
    if branch_scaling is not None:
        joined = [block.layers[-1] for block in blocks] if network.variant == "ResNet" else layers
        for index, layer in enumerate(joined, 1):
            layer.branch_scale = branch_scale(branch_scaling, index, len(joined))
    if zero_init_gamma:
        for block in blocks:
            nn.init.zeros_(block.layers[-1].bn.weight)
    with torch.no_grad():
        for layer in layers:
            for name, weight in layer.named_parameters():
                if weight.dim() == 4 and not name.startswith("projection"):
                    weight.mul_(init_scale)
