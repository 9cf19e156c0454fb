"""The memory-format rule: an output has its input's format."""

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether x (N, C, H, W) counts as channels_last, by the rule of torch's own convolutions.

    The recorded strides must not overlap when read in the order C, W, H, N; so a slice of channels of a
    channels_last tensor counts, and so do sizes of one whose strides say so. What fits both formats to the letter
    counts as contiguous.
    """
    span = 1  # of the dimensions so far
    for dim in (1, 3, 2, 0):
        size, stride = x.shape[dim], x.stride(dim)
        if size == 0 or stride < span or (dim == 0 and span == x.stride(1)):
            return False
        span = stride * size
    return True


def to_format(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """x itself, or a dense copy in the other format."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
