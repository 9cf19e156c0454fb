"""The memory-format rule: an output has its input's format; in a fused model, that of torch's own convolution."""

import torch

from . import warn

_WARNED_ON = "cuda"  # device type; in the interpreter the cost of a copy does not matter
_BOTH_WAYS = (
    "x came contiguous: rir_kernels copies it to channels_last, and the output back to contiguous, at every layer. "
    "Call model.to(memory_format=torch.channels_last) once: a model of rir.fuse_ then keeps that format behind its "
    "first convolution. The modules and functions of rir_kernels return x's format: for them convert the images as "
    "well, images.contiguous(memory_format=torch.channels_last)."
)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether x (N, C, H, W) counts as channels_last, by the rule of torch's own convolutions.

    The recorded strides must not overlap when read in the order C, W, H, N. So a channel slice of a channels_last
    tensor counts, and so do sizes of one if their strides are channels_last. A tensor that fits both formats exactly
    counts as contiguous.
    """
    span = 1  # covered by the dimensions so far
    for dim in (1, 3, 2, 0):
        size, stride = x.shape[dim], x.stride(dim)
        if size == 0 or stride < span or (dim == 0 and span == x.stride(1)):
            return False
        span = stride * size
    return True


def conv_format(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether torch's own convolution returns channels_last: if x or the weight is. Without a weight: if x is."""
    return is_channels_last(x) or (weight is not None and is_channels_last(weight))


def warn_of_copies(x: torch.Tensor) -> None:
    """Warns once that the kernels have to copy contiguous images, if the copies happen and cost time."""
    if x.device.type == _WARNED_ON and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1:
        warn.warn_once(_BOTH_WAYS)


def to_format(x: torch.Tensor, channels_last: bool | None) -> torch.Tensor:
    """Returns x itself, or a dense copy in the other format whose strides identify that format.

    None: x itself, whatever its format.
    """
    if channels_last is None:
        return x
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if is_channels_last(x) != channels_last:  # `contiguous` would not copy a tensor that fits both formats
        return x.clone(memory_format=memory_format)
    return x.contiguous(memory_format=memory_format)


def as_channels_last(x: torch.Tensor) -> torch.Tensor:
    """Returns x if it counts as channels_last (channel slices do: the kernels read them in place), else a copy."""
    return x if is_channels_last(x) else x.contiguous(memory_format=torch.channels_last)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns x if it is dense NHWC, else a dense NHWC copy."""
    return x.contiguous(memory_format=torch.channels_last)


def dense_channels_last(x: torch.Tensor) -> torch.Tensor:
    """Returns x, copied only if needed, with the exact strides of a new channels_last tensor, even at sizes of one."""
    n, c, h, w = x.shape
    return x.contiguous(memory_format=torch.channels_last).as_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def empty_channels_last(shape, like: torch.Tensor) -> torch.Tensor:
    """Returns an uninitialized, dense tensor with `like`'s dtype and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
