"""Fused convolution blocks for PyTorch: conv, batch norm, residual and ReLU of "Resnet in Resnet" and of any ResNet.

    import rir_kernels as rir
    y = rir.functional.conv_bn_act(x, weight, ...)     the one operation
    rir.RiRLayer, rir.RiRBlock, rir.ConvBNAct          drop-in modules
    rir.fuse_(model), rir.unfuse_(model)               into an existing model, and out again
    rir.register_pattern(kind), rir.fold_bn_(model)    for blocks of your own, and for inference
    rir.fusion_status(model), rir.fused_source(module) what runs fused now and why not, and as what
    with rir.record_calls(model) as calls: ...         every operation that ran, and in which implementation
    rir.compare(reference, candidate, inputs)          proof of equivalence
    rir.convert_sync_batchnorm(model)                  batch statistics over all ranks
    rir.precompile(model, images)                      its kernels compiled ahead of the first step, in parallel
    with rir.preserved_statistics(model): ...          what warms up a CUDA graph does not count as batches
    with rir.recompute(): ...                          half of the activations kept, the rest made again in backward

Nothing here imports triton or starts CUDA: kernels are loaded by the first call that runs them.
"""

from . import functional, reference, surgery
from .autograd.recomputation import recompute
from .common.cuda_graphs import preserved_statistics
from .dispatch.calls import record_calls
from .dispatch.preference import use_impl
from .env import env_report
from .equivalence import EquivalenceReport, compare
from .modules import ConvBNAct, RiRBlock, RiRLayer
from .precompiling import PrecompileReport, precompile
from .surgery import (
    FusionReport,
    FusionStatus,
    fold_bn_,
    fuse_,
    fused_source,
    fusion_status,
    register_pattern,
    unfuse_,
    unregister_pattern,
)
from .sync_batchnorm import SyncBatchNorm2d, convert_sync_batchnorm

__version__ = "0.2.0.dev0"
__all__ = [
    "ConvBNAct",
    "EquivalenceReport",
    "FusionReport",
    "FusionStatus",
    "PrecompileReport",
    "RiRBlock",
    "RiRLayer",
    "SyncBatchNorm2d",
    "compare",
    "convert_sync_batchnorm",
    "env_report",
    "fold_bn_",
    "functional",
    "fuse_",
    "fused_source",
    "fusion_status",
    "precompile",
    "preserved_statistics",
    "recompute",
    "record_calls",
    "reference",
    "register_pattern",
    "surgery",
    "unfuse_",
    "unregister_pattern",
    "use_impl",
]


def __dir__() -> list[str]:
    """What completion offers: the public names, not the modules that make them."""
    return sorted(name for name in globals() if name in __all__ or name.startswith("__"))
