"""The package's names in plain, naive PyTorch: what the kernels are compared to, and where to read what they do.

Four separate convolutions, two batch norms, separate adds and ReLUs, all out of place. Any device, any float dtype.
"""

from . import functional
from .functional import conv_bn_act
from .modules import ConvBNAct, RiRBlock, RiRLayer

__all__ = ["ConvBNAct", "RiRBlock", "RiRLayer", "conv_bn_act", "functional"]
