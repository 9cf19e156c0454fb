"""Fused forwards for the blocks of an existing model, and back: the modules stay, only how forward runs changes."""

from .fuse import fuse_, unfuse_
from .report import FusionReport

__all__ = ["FusionReport", "fuse_", "unfuse_"]
