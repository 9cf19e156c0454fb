"""Switches that decide how kernels run: torch's, Triton's and this package's environment variable."""

import os

import torch


def tf32_allowed() -> bool:
    """Whether torch allows TF32 in fp32 convolutions."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined] # torch's types lack it


def overlap_asked() -> bool:
    """Whether launches should overlap the preceding one (programmatic dependent launch)."""
    return os.environ.get("RIR_KERNELS_OVERLAP") == "1"


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
