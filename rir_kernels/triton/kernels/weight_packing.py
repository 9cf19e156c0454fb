"""Copies a weight to the layout and precision that the convolution reads."""

import triton
import triton.language as tl

from rir_kernels.triton.kernels.pointwise import pdl_wait


@triton.jit(do_not_specialize=["stride_row", "stride_column", "stride_h", "stride_w"])
def _pack_weight_kernel(
    weight_ptr,
    out_ptr,  # [taps, rows, pitch]
    size,  # elements of out
    rows,
    columns,
    pitch,  # columns, padded to the alignment
    stride_row,  # of the weight, in elements
    stride_column,
    stride_h,
    stride_w,
    KERNEL_W: tl.constexpr,
    TF32: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_wait(USE_PDL)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = index % pitch
    row = index // pitch % rows
    tap = index // pitch // rows
    source = row * stride_row + column * stride_column + tap // KERNEL_W * stride_h + tap % KERNEL_W * stride_w
    weight = tl.load(weight_ptr + source, mask=(index < size) & (column < columns), other=0.0)
    if TF32:
        # round to nearest; the hardware truncates, with 2.2 to 2.7 times the error
        bits = (weight.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        weight = tl.where(weight == weight, bits.to(tl.float32, bitcast=True), weight)
    tl.store(out_ptr + index, weight, mask=index < size)
