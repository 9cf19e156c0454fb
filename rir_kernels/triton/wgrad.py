"""Weight gradient: an implicit GEMM over the pixels, split among programs.

    dW[co, i, j, ci] = sum over pixels p of  dz[p, co] * x[pixel p shifted by tap (i, j), ci]

One program takes one row of taps (all KERNEL_W of them share each tile of dz), one block of channels and STEPS pixel
tiles; partial sums go to [split, C_out, taps, C_in] and `partials` adds them in a fixed order, so the
result is bit-identical from run to run. Both operands are read from shared memory as the descriptors wrote them, for
which the left one needs a box with leading ones: WALK says how a tile of P pixels is a box [1, 1, P, channels].

    "rows"    dz as [1, 1, N*H*W, C]: P consecutive pixels, whole rows (x: a box of BOX_N images, BOX_H rows of W)
    "images"  dz and x as [H, W, N, C]: one pixel of P images
    "row"     dz and x as [N, H, W, C]: P pixels of one row

Tiles past the end read zeros. At stride 2 the taps of a row meet two column planes of x, and there is one launch for
each parity of the tap rows (see `conv`).
"""

import triton
import triton.language as tl


@triton.jit
def _load_shifted(desc, d0, d1, d2, c, dh, dw, WALK: tl.constexpr, P: tl.constexpr, BLOCK_CI: tl.constexpr):
    """[P, BLOCK_CI] of x, the tile at (d0, d1, d2) shifted by (dh, dw) pixels."""
    if WALK == "images":
        x = desc.load([d0 + dh, d1 + dw, d2, c])
    else:
        x = desc.load([d0, d1 + dh, d2 + dw, c])
    return x.reshape([P, BLOCK_CI])


@triton.jit(do_not_specialize=["H", "W", "TILES_N", "TILES_H", "TILES_W"])
def _conv_bwd_weight_kernel(
    dz_desc,  # box [1, 1, P, BLOCK_CO]
    x0_desc,  # the column planes of x that belong to row plane PLANE_H; box of P pixels by BLOCK_CI
    x1_desc,
    partial_ptr,  # [splits, C_out, taps, C_in] fp32
    H,  # of dz
    W,
    TILES_N,
    TILES_H,
    TILES_W,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    PLANE_H: tl.constexpr,
    WALK: tl.constexpr,
    BOX: tl.constexpr,  # pixels of a tile along N, H, W
    STEPS: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    P: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    FIRST_H: tl.constexpr = (PLANE_H + PAD[0]) % STRIDE[0]
    TAPS_H: tl.constexpr = (KERNEL[0] - FIRST_H + STRIDE[0] - 1) // STRIDE[0]
    OFFSET_H: tl.constexpr = (FIRST_H - PAD[0] - PLANE_H) // STRIDE[0]
    BLOCKS_CI: tl.constexpr = (C_IN + BLOCK_CI - 1) // BLOCK_CI
    BLOCKS_CO: tl.constexpr = (C_OUT + BLOCK_CO - 1) // BLOCK_CO
    pid = tl.program_id(0)
    ci = pid % BLOCKS_CI * BLOCK_CI
    co = pid // BLOCKS_CI % BLOCKS_CO * BLOCK_CO
    i = pid // (BLOCKS_CI * BLOCKS_CO) % TAPS_H
    split = pid // (BLOCKS_CI * BLOCKS_CO * TAPS_H)
    dh = OFFSET_H + i

    # column plane and offset of each tap of the row: Python's floor division, so parity is right for negatives
    PLANE_0: tl.constexpr = (0 - PAD[1]) % STRIDE[1]
    PLANE_1: tl.constexpr = (1 - PAD[1]) % STRIDE[1]
    PLANE_2: tl.constexpr = (2 - PAD[1]) % STRIDE[1]
    planes = (x0_desc, x1_desc)
    acc0 = tl.zeros([BLOCK_CO, BLOCK_CI], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_CO, BLOCK_CI], dtype=tl.float32)
    acc2 = tl.zeros([BLOCK_CO, BLOCK_CI], dtype=tl.float32)
    for step in tl.range(STEPS):
        tile = split * STEPS + step
        if WALK == "images":  # n fastest
            d2 = tile % TILES_N * P
            d1 = tile // TILES_N % W
            d0 = tile // (TILES_N * W)
            dz = dz_desc.load([d0, d1, d2, co])
        else:
            d2 = tile % TILES_W * BOX[2]
            d1 = tile // TILES_W % TILES_H * BOX[1]
            d0 = tile // (TILES_W * TILES_H) * BOX[0]
            if WALK == "rows":
                dz = dz_desc.load([0, 0, tile * P, co])
            else:
                dz = dz_desc.load([d0, d1, d2, co])
        dz_t = dz.reshape([P, BLOCK_CO]).T  # [BLOCK_CO, P]
        DW_0: tl.constexpr = (0 - PAD[1] - PLANE_0) // STRIDE[1]
        if planes[PLANE_0] is not None:
            x = _load_shifted(planes[PLANE_0], d0, d1, d2, ci, dh, DW_0, WALK, P, BLOCK_CI)
            acc0 = tl.dot(dz_t, x, acc0, input_precision=PRECISION)
        if KERNEL[1] == 3:
            DW_1: tl.constexpr = (1 - PAD[1] - PLANE_1) // STRIDE[1]
            DW_2: tl.constexpr = (2 - PAD[1] - PLANE_2) // STRIDE[1]
            if planes[PLANE_1] is not None:
                x = _load_shifted(planes[PLANE_1], d0, d1, d2, ci, dh, DW_1, WALK, P, BLOCK_CI)
                acc1 = tl.dot(dz_t, x, acc1, input_precision=PRECISION)
            if planes[PLANE_2] is not None:
                x = _load_shifted(planes[PLANE_2], d0, d1, d2, ci, dh, DW_2, WALK, P, BLOCK_CI)
                acc2 = tl.dot(dz_t, x, acc2, input_precision=PRECISION)

    co_range = co + tl.arange(0, BLOCK_CO)
    ci_range = ci + tl.arange(0, BLOCK_CI)
    mask = (co_range < C_OUT)[:, None] & (ci_range < C_IN)[None, :]
    tap = (FIRST_H + STRIDE[0] * i) * KERNEL[1]
    row = (split.to(tl.int64) * C_OUT + co_range) * (KERNEL[0] * KERNEL[1]) + tap  # [BLOCK_CO]
    out = partial_ptr + row[:, None] * C_IN + ci_range[None, :]
    tl.store(out, acc0, mask=mask)
    if KERNEL[1] == 3:
        tl.store(out + C_IN, acc1, mask=mask)
        tl.store(out + 2 * C_IN, acc2, mask=mask)
