"""Prepares the weight for the convolution: in place if possible, else as a copy."""

import torch

from rir_kernels.triton.kernels.weight_packing import _pack_weight_kernel
from rir_kernels.triton.launch.runtime import (
    ALIGNMENT,
    aligned_channels,
    device_guard,
    dot_precision,
    has_aligned_rows,
    launch,
)
from rir_kernels.triton.tiling.conv_cost import cdiv


def pack_weight(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Returns [taps, C_out, C_in] (or [taps, C_in, C_out], a copy) of a weight (C_out, C_in, kh, kw).

    The result is a view of a channels-last parameter with aligned rows, else a copy; TF32 needs a rounded copy.
    """
    c_out, c_in, kh, kw = weight.shape
    tf32 = dot_precision(weight) == "tf32"
    in_place = weight.is_contiguous(memory_format=torch.channels_last) and not (transposed or tf32)
    if in_place and has_aligned_rows(c_in, weight.element_size()) and weight.data_ptr() % ALIGNMENT == 0:
        return weight.as_strided((kh * kw, c_out, c_in), (c_in, kh * kw * c_in, 1))
    source = weight.permute(2, 3, 1, 0) if transposed else weight.permute(2, 3, 0, 1)
    rows, columns = source.shape[2:]
    packed = torch.empty(
        (kh * kw, rows, aligned_channels(columns, weight.element_size())), dtype=weight.dtype, device=weight.device
    )
    block = 1024
    with device_guard(weight):
        launch(
            _pack_weight_kernel, cdiv(packed.numel(), block),
            weight, packed, packed.numel(), rows, columns, packed.shape[2], *source.stride()[2:], *source.stride()[:2],
            KERNEL_W=kw, TF32=tf32, BLOCK=block,
        )  # fmt: skip
    return packed[..., :columns]
