"""Weight gradient: an implicit GEMM whose reduction over the pixels is split among programs.

    dW[co, i, j, ci] = sum over pixels p of  dz[p, co] * x[pixel p shifted by tap (i, j), ci]

A `position` is one column of taps and one block of channels. The KERNEL_H taps of a column share each tile of dz, and
at stride 1 ROWS vertically adjacent tiles of dz share their rows of x. The tiles of all positions form one sequence.
Each program takes TILES_PER_PROGRAM consecutive tiles of it, so all programs finish at about the same time for any
number of positions. The middle column of the kernel comes first, with TILES per position; the others have EDGE_TILES,
fewer if SKIP_PADDING omits the column of pixels that would meet only padding. When the position changes, a program
writes its sums to [slot, C_out, taps, C_in]; slot 0 belongs to the position's first program. The number of tiles is a
run-time value: one kernel serves every batch size.
`_sum_weight_grad_kernel` adds the slots in order, so the result is bit-identical from run to run.

`tl.dot` reads both operands from shared memory as the descriptors wrote them. This requires a box with leading ones for
the left operand: PIXEL_ORDER selects how a tile of P pixels becomes a box [1, 1, P, channels].

    "rows"    dz as [1, 1, N*H*W, C]: P consecutive pixels in whole rows (x: a box of BOX_N images, BOX_H rows of W)
    "images"  dz and x as [H, W, N, C]: one pixel of P images
    "row"     dz and x as [N, H, W, C]: P pixels of one row

At stride 2 a column of taps meets one column plane of x and both row planes (see `conv`).
"""

import triton
import triton.language as tl

from rir_kernels.triton.kernels.pointwise import pdl_wait
from rir_kernels.triton.kernels.tma import load_box


@triton.jit
def _load(
    desc, n, h, w, c,
    PIXEL_ORDER: tl.constexpr, BOX: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Loads [P, BLOCK], or [BLOCK, P] with T, from pixel (n, h, w) and channel c of a tensor."""
    if PIXEL_ORDER == "images":
        TURNED: tl.constexpr = (BOX[1], BOX[2], BOX[0])
        return load_box(desc, h, w, n, c, TURNED, BLOCK, T, C)
    else:
        return load_box(desc, n, h, w, c, BOX, BLOCK, T, C)


@triton.jit
def _first_tile(position, TILES, EDGE_TILES, BLOCKS):
    """Returns the index of a position's first tile; the first BLOCKS positions have TILES tiles each."""
    return position * EDGE_TILES + tl.minimum(position, BLOCKS) * (TILES - EDGE_TILES)


@triton.jit
def _position_of(tile, TILES, EDGE_TILES, BLOCKS: tl.constexpr):
    others = tl.maximum(tile - BLOCKS * TILES, 0)
    return tl.where(tile < BLOCKS * TILES, tile // TILES, BLOCKS + others // EDGE_TILES)


@triton.jit(do_not_specialize=["TILES_H", "TILES_W", "TILES", "EDGE_TILES", "TILES_PER_PROGRAM"])
def _conv_bwd_weight_kernel(
    dz_desc,  # box [1, 1, P, BLOCK_CO]
    x00_desc,  # parity planes of x, indexed row, column; box of P pixels by BLOCK_CI; None if the stride has fewer
    x01_desc,
    x10_desc,
    x11_desc,
    partial_ptr,  # [slots, C_out, taps, C_in] fp32
    TILES_H,  # per image
    TILES_W,
    TILES,
    EDGE_TILES,
    TILES_PER_PROGRAM,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    PIXEL_ORDER: tl.constexpr,
    BOX: tl.constexpr,  # pixels of a tile along N, H, W
    ROWS: tl.constexpr,
    SKIP_PADDING: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_wait(USE_PDL)
    # prologue: which tiles
    P: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    PIXELS: tl.constexpr = (1, 1, P)
    TAPS: tl.constexpr = KERNEL[0]
    BLOCKS_CI: tl.constexpr = (C_IN + BLOCK_CI - 1) // BLOCK_CI
    BLOCKS_CO: tl.constexpr = (C_OUT + BLOCK_CO - 1) // BLOCK_CO
    BLOCKS: tl.constexpr = BLOCKS_CI * BLOCKS_CO
    pid = tl.program_id(0)
    first = pid * TILES_PER_PROGRAM
    end = tl.minimum(first + TILES_PER_PROGRAM, _first_tile(BLOCKS * KERNEL[1], TILES, EDGE_TILES, BLOCKS))
    last_position = _position_of(end - 1, TILES, EDGE_TILES, BLOCKS)
    for position in tl.range(_position_of(first, TILES, EDGE_TILES, BLOCKS), last_position + 1):
        # the position's channels, kernel column and planes
        ci = position % BLOCKS_CI * BLOCK_CI
        co = position // BLOCKS_CI % BLOCKS_CO * BLOCK_CO
        j = (position // BLOCKS + KERNEL[1] // 2) % KERNEL[1]
        first_w = 0
        columns = TILES_W
        if SKIP_PADDING:
            first_w = (j == 0).to(tl.int32)
            columns = TILES_W - (j != 1).to(tl.int32)
        even_desc = x00_desc
        odd_desc = x10_desc
        dw = j - PAD[1]
        if STRIDE[1] == 2:
            if (j + PAD[1]) % 2 == 1:
                even_desc = x01_desc
                odd_desc = x11_desc
            dw = (j + PAD[1]) // 2 - PAD[1]  # half of the above; kept nonnegative, as // rounds towards zero
        # main loop: one accumulator [BLOCK_CO, BLOCK_CI] per tap of the column
        accs = ()
        for _ in tl.static_range(TAPS):
            accs += (tl.zeros([BLOCK_CO, BLOCK_CI], dtype=tl.float32),)
        begin = _first_tile(position, TILES, EDGE_TILES, BLOCKS)
        stop = _first_tile(position + 1, TILES, EDGE_TILES, BLOCKS)
        for tile in tl.range(tl.maximum(first, begin) - begin, tl.minimum(end, stop) - begin):
            w = (first_w + tile % columns) * BOX[2]
            h = tile // columns % TILES_H * (BOX[1] * ROWS)
            n = tile // (columns * TILES_H) * BOX[0]
            rows = ()  # of x, [P, BLOCK_CI] each
            if STRIDE[0] == 1:
                for row in tl.static_range(ROWS + TAPS - 1):
                    rows += (
                        _load(even_desc, n, h + row - PAD[0], w + dw, ci, PIXEL_ORDER, BOX, BLOCK_CI, False, C_IN),
                    )
            else:
                for i in tl.static_range(TAPS):
                    plane = even_desc if (i - PAD[0]) % 2 == 0 else odd_desc
                    rows += (
                        _load(plane, n, h + (i - PAD[0]) // 2, w + dw, ci, PIXEL_ORDER, BOX, BLOCK_CI, False, C_IN),
                    )
            for row in tl.static_range(ROWS):
                if PIXEL_ORDER == "rows":
                    dz = _load(dz_desc, 0, 0, tile * P, co, PIXEL_ORDER, PIXELS, BLOCK_CO, True, C_OUT)
                else:
                    dz = _load(dz_desc, n, h + row, w, co, PIXEL_ORDER, BOX, BLOCK_CO, True, C_OUT)
                # dz: [BLOCK_CO, P]
                sums = ()
                for i in tl.static_range(TAPS):
                    sums += (tl.dot(dz, rows[row + i], accs[i], input_precision=PRECISION),)
                accs = sums

        # store
        co_range = co + tl.arange(0, BLOCK_CO)
        ci_range = ci + tl.arange(0, BLOCK_CI)
        mask = (co_range < C_OUT)[:, None] & (ci_range < C_IN)[None, :]
        # 64 bits only for the slot: the accumulators leave few registers for addresses
        slot = pid - begin // TILES_PER_PROGRAM
        out = partial_ptr + slot.to(tl.int64) * (C_OUT * TAPS * KERNEL[1] * C_IN) + j * C_IN
        offset = co_range[:, None] * (TAPS * KERNEL[1] * C_IN) + ci_range[None, :]
        for i in tl.static_range(TAPS):
            tl.store(out + i * (KERNEL[1] * C_IN) + offset, accs[i], mask=mask)


@triton.jit(do_not_specialize=["TILES", "EDGE_TILES", "TILES_PER_PROGRAM", "SLOTS", "BLOCK_CO", "BLOCK_CI", "scale"])
def _sum_weight_grad_kernel(
    partial_ptr,  # [SLOTS, PACK * C_out, taps of the packed kernel, PACK * C_in] fp32
    out_ptr,  # [C_out, taps, C_in], any float type
    TILES,
    EDGE_TILES,
    TILES_PER_PROGRAM,
    SLOTS,
    BLOCK_CO,  # the tile is a run-time value: one kernel sums the partial results of all tiles
    BLOCK_CI,
    scale,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    KERNEL: tl.constexpr,
    PAD_W: tl.constexpr,
    PACK: tl.constexpr,
    PACKED_W: tl.constexpr,  # columns of the packed kernel
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Computes out = scale * sum over the slots and over the pixels of a pack.

    At tap j, pixel a of a pack of dz meets pixel b of the pack of x that is s packs further on:
    PACK * s + b = a + j - PAD_W.
    """
    pdl_wait(USE_PDL)
    PACKED_PAD: tl.constexpr = (PAD_W + PACK - 1) // PACK
    ROW: tl.constexpr = PACK * C_IN
    VECTOR: tl.constexpr = 4 if C_IN % 4 == 0 else 1
    BLOCKS_CI = (PACK * C_IN + BLOCK_CI - 1) // BLOCK_CI
    BLOCKS = (PACK * C_OUT + BLOCK_CO - 1) // BLOCK_CO * BLOCKS_CI
    STRIDE: tl.constexpr = PACK * C_OUT * KERNEL[0] * PACKED_W * ROW
    SIZE: tl.constexpr = C_OUT * KERNEL[0] * KERNEL[1] * C_IN
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_element = element < SIZE
    ci = element % C_IN
    j = element // C_IN % KERNEL[1]
    i = element // (C_IN * KERNEL[1]) % KERNEL[0]
    co = element // (C_IN * KERNEL[1] * KERNEL[0])
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for a in tl.static_range(PACK):
        from_first = a + j - PAD_W + PACK * PACKED_PAD  # counted from the leftmost pack any pixel meets: nonnegative
        column = from_first // PACK
        packed_co = a * C_OUT + co
        packed_ci = from_first % PACK * C_IN + ci
        position = (column + PACKED_W - PACKED_W // 2) % PACKED_W * BLOCKS
        position += packed_co // BLOCK_CO * BLOCKS_CI + packed_ci // BLOCK_CI
        begin = _first_tile(position, TILES, EDGE_TILES, BLOCKS)
        stop = _first_tile(position + 1, TILES, EDGE_TILES, BLOCKS)
        # four consecutive channels are one load; the compiler doesn't infer this
        slots = tl.max_constancy((stop - 1) // TILES_PER_PROGRAM - begin // TILES_PER_PROGRAM + 1, VECTOR)
        offset = ((packed_co * KERNEL[0] + i) * PACKED_W + column) * ROW + packed_ci
        offset = tl.max_contiguous(tl.multiple_of(offset, VECTOR), VECTOR)
        for start in tl.range(0, SLOTS, BLOCK_S):
            slot = start + tl.arange(0, BLOCK_S)
            mask = (slot[:, None] < slots[None, :]) & is_element[None, :]
            part = tl.load(partial_ptr + slot[:, None].to(tl.int64) * STRIDE + offset[None, :], mask=mask, other=0.0)
            acc += tl.sum(part, 0)
    tl.store(out_ptr + element, (acc * scale).to(out_ptr.dtype.element_ty), mask=is_element)
