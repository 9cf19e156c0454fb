"""The second stage of every split sum: partial results added in a fixed order, for bit-identical runs."""

import triton
import triton.language as tl

from rir_kernels.triton.pointwise import wait_ahead


@triton.jit(do_not_specialize=["splits", "scale"])
def _sum_partials_kernel(
    partial_ptr,  # [splits, size] fp32
    out_ptr,  # [size], any float type
    splits,
    size,
    scale,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = scale * sum over the splits."""
    wait_ahead(OVERLAP)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < size
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for first in tl.range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        mask = (split < splits)[:, None] & is_column[None, :]
        part = tl.load(partial_ptr + split[:, None].to(tl.int64) * size + column[None, :], mask=mask, other=0.0)
        acc += tl.sum(part, 0)
    tl.store(out_ptr + column, (acc * scale).to(out_ptr.dtype.element_ty), mask=is_column)
