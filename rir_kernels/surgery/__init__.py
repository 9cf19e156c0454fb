"""Fuses the blocks of an existing model, reversibly: the modules stay, only their forward changes."""

from . import old_names  # noqa: F401  # old pickles import by them
from .fold import fold_bn_
from .fuse import fuse_, unfuse_
from .patterns import register_pattern, unregister_pattern
from .report import FusionReport
from .runtime import bn_act, conv_bn_act
from .status import FusionStatus, fused_source, fusion_status

__all__ = [
    "FusionReport", "FusionStatus", "bn_act", "conv_bn_act", "fold_bn_", "fuse_", "fused_source", "fusion_status",
    "register_pattern", "unfuse_", "unregister_pattern",
]  # fmt: skip
