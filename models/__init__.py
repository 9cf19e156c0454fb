"""Networks built from rir_kernels, run from a checkout; the wheel does not hold them."""

from .rir import RiR

__all__ = ["RiR"]
