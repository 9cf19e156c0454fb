"""Loads boxes of a tensor: by TMA descriptor, or by pointers on GPUs without TMA (before Hopper).

For pointers a tuple replaces the descriptor: (pointer, sizes, strides of all dimensions but the last, which is
contiguous). The pointer and the strides are multiples of 16 bytes, as a descriptor's are. Triton accepts descriptors
on these GPUs too, but lowers each to a four-dimensional load with 64-bit coordinates in registers, and converts its
layout in the main loop.
"""

import triton
import triton.language as tl


@triton.jit
def load_box(
    source,
    first,
    second,
    third,
    channel,
    BOX: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr = None,
):
    """Loads [P, BLOCK], or [BLOCK, P] with T, from a four-dimensional tensor of C channels.

    Out-of-range coordinates read zero.
    """
    P: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    if isinstance(source, tl.tensor_descriptor):
        box = source.load([first, second, third, channel]).reshape([P, BLOCK])
        return box.T if T else box
    else:
        index = tl.arange(0, P)
        in_first = index // (BOX[1] * BOX[2])
        in_second = index // BOX[2] % BOX[1]
        in_third = index % BOX[2]
        # [P] each
        mask = _within(first, in_first, source[1], BOX[0]) & _within(second, in_second, source[2], BOX[1])
        mask &= _within(third, in_third, source[3], BOX[2])
        strides = source[5].to(tl.int64), source[6].to(tl.int64), source[7].to(tl.int64)
        inside = in_first * strides[0] + in_second * strides[1] + in_third * strides[2]  # loop-invariant
        corner = first * strides[0] + second * strides[1] + third * strides[2]
        return _load_rows(source[0], corner + inside, mask, channel, source[4] if C is None else C, BLOCK, T)


@triton.jit
def load_matrix(
    source,
    tap,
    row,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    T: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Loads [ROWS, COLUMNS], or its transpose with T, from matrix `tap` (HEIGHT x WIDTH) of a three-dimensional tensor.

    Out-of-range coordinates read zero.
    """
    if isinstance(source, tl.tensor_descriptor):
        box = source.load([tap, row, column]).reshape([ROWS, COLUMNS])
        return box.T if T else box
    else:
        index = tl.arange(0, ROWS)
        offset = tap * source[4].to(tl.int64) + (row + index) * source[5].to(tl.int64)
        return _load_rows(source[0], offset, row + index < HEIGHT, column, WIDTH, COLUMNS, T)


@triton.jit
def round_as(values, source):
    """Rounds fp32 values to the dtype of the tensor and back."""
    if isinstance(source, tl.tensor_descriptor):
        return values.to(source.dtype).to(tl.float32)
    else:
        return values.to(source[0].dtype.element_ty).to(tl.float32)


@triton.jit
def _within(first, index, SIZE, BOX: tl.constexpr):
    if BOX == 1:
        return (first + index >= 0) & (first < SIZE)
    else:
        return (first + index >= 0) & (first + index < SIZE)


@triton.jit
def _load_rows(ptr, offset, mask, column, SIZE, BLOCK: tl.constexpr, T: tl.constexpr):
    """Loads [rows, BLOCK]: BLOCK contiguous elements from each offset + column.

    With T loads [BLOCK, rows] directly, without a transpose.
    """
    rows = tl.multiple_of(ptr + offset, 16)
    columns = column + tl.arange(0, BLOCK)
    if T:
        return tl.load(rows[None, :] + columns[:, None], mask=mask[None, :] & (columns < SIZE)[:, None], other=0.0)
    else:
        return tl.load(rows[:, None] + columns[None, :], mask=mask[:, None] & (columns < SIZE)[None, :], other=0.0)
