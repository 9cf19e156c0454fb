"""Fused convolution blocks for PyTorch: conv, batch norm, residual and ReLU of "Resnet in Resnet" and of any ResNet.

    import rir_kernels as rir
    y = rir.functional.conv_bn_act(x, weight, ...)     the one operation
    rir.RiRLayer, rir.RiRBlock, rir.ConvBNAct          drop-in modules
    rir.fuse_(model), rir.unfuse_(model)               fuse an existing model, and undo it
    rir.register_pattern(kind), rir.fold_bn_(model)    fuse your own blocks; fold norms for inference
    rir.fusion_status(model), rir.fused_source(module) what runs fused and why not; the source that runs
    with rir.record_calls(model) as calls: ...         every operation that ran, and its implementation
    rir.compare(reference, candidate, inputs)          proof of equivalence
    rir.convert_sync_batchnorm(model)                  batch statistics over all ranks
    rir.precompile(model, images)                      compile its kernels ahead of the first step, in parallel
    with rir.preserved_statistics(model): ...          CUDA graph warm-up doesn't update running statistics
    with rir.recompute(): ...                          store one activation per layer, recompute the other

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
    """Limits completion to the public names, without the modules that define them."""
    return sorted(name for name in globals() if name in __all__ or name.startswith("__"))
