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
    """x itself, or a dense copy in the other format, in whose strides the format can be read again."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if is_channels_last(x) != channels_last:  # `contiguous` would leave what fits both formats as it is
        return x.clone(memory_format=memory_format)
    return x.contiguous(memory_format=memory_format)


def as_channels_last(x: torch.Tensor) -> torch.Tensor:
    """x itself where it counts as channels_last (slices of channels do: the kernels read them in place), or a copy."""
    return x if is_channels_last(x) else x.contiguous(memory_format=torch.channels_last)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where its pixels lie densely one behind the other, channels innermost, or a copy where they do."""
    return x.contiguous(memory_format=torch.channels_last)


def dense_channels_last(x: torch.Tensor) -> torch.Tensor:
    """x, copied only if it must be, with exactly the strides of a fresh channels_last tensor, sizes of one included."""
    n, c, h, w = x.shape
    return x.contiguous(memory_format=torch.channels_last).as_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def empty_channels_last(shape, like: torch.Tensor) -> torch.Tensor:
    """Uninitialized, dense, with `like`'s dtype and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
