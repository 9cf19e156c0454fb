"""Fused convolution blocks for PyTorch: conv, batch norm, residual and ReLU of "Resnet in Resnet" and of any ResNet.

    import rir_kernels as rir
    y = rir.functional.conv_bn_act(x, weight, ...)     the one operation
    rir.RiRLayer, rir.RiRBlock, rir.ConvBNAct          drop-in modules
    rir.fuse_(model), rir.unfuse_(model)               into an existing model, and out again
    rir.compare(reference, candidate, inputs)          proof of equivalence
    with rir.preserved_statistics(model): ...          what warms up a CUDA graph does not count as batches
    with rir.recompute(): ...                          half of the activations kept, the rest made again in backward

Nothing here imports triton or starts CUDA: kernels are loaded by the first call that runs them.
"""

from . import functional, reference
from .dispatch import use_impl
from .env import env_report
from .equivalence import EquivalenceReport, compare
from .graphs import preserved_statistics
from .modules import ConvBNAct, RiRBlock, RiRLayer
from .recomputing import recompute
from .surgery import FusionReport, fuse_, unfuse_

__version__ = "0.1.0"
__all__ = [
    "ConvBNAct",
    "EquivalenceReport",
    "FusionReport",
    "RiRBlock",
    "RiRLayer",
    "compare",
    "env_report",
    "functional",
    "fuse_",
    "preserved_statistics",
    "recompute",
    "reference",
    "unfuse_",
    "use_impl",
]
