"""Switches that decide how kernels run: torch's, Triton's and this package's environment variable."""

import os

import torch


def tf32_allowed() -> bool:
    """torch's own switch for fp32 convolutions."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined] # torch's types lack it


def overlap_asked() -> bool:
    """Whether launches are to overlap the one ahead of them (programmatic dependent launch)."""
    return os.environ.get("RIR_KERNELS_OVERLAP") == "1"


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
