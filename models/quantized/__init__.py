"""Quantization-aware training of the networks, and inference in integers (arXiv 2105.03536)."""

from .convert import quantize_
from .integer import integer

__all__ = ["integer", "quantize_"]
