"""The convolution's main loops: which taps each one adds, and which loads are shared.

    add_plane     tap by tap, at any stride: channel blocks share the pixels
    add_rows      kernel column by kernel column, at stride 1: adjacent output rows also share rows of the input
    add_inside    only the taps that read the image, for one pixel of many images
    sum_folded    blocks of 2x2 pixels, for few channels: the four pixels share a product's rows

Names and formulas are those of `rir_kernels.triton.kernels.conv`.
"""

import triton
import triton.language as tl

from rir_kernels.triton.kernels.tma import load_box, load_matrix


@triton.jit
def add_plane(
    accs,  # C_BLOCKS accumulators [BLOCK_C, P], which share the loads of pixels
    x_desc,  # [N, H_plane, W_plane, C_IN], box [BOX_N, BOX_H, BOX_W, BLOCK_K]
    w_desc,  # [taps, C_OUT, C_IN], box [1, BLOCK_C, BLOCK_K]; WEIGHT_T: [taps, C_IN, C_OUT], box [1, BLOCK_K, BLOCK_C]
    n,
    h,
    w,
    c,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    PLANE_H: tl.constexpr,
    PLANE_W: tl.constexpr,
    SIGN: tl.constexpr,
    WEIGHT_T: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to accs the taps that meet parity plane (PLANE_H, PLANE_W), if any do."""
    FIRST_H: tl.constexpr = (PLANE_H + PAD[0]) % STRIDE[0]
    FIRST_W: tl.constexpr = (PLANE_W + PAD[1]) % STRIDE[1]
    TAPS_H: tl.constexpr = (KERNEL[0] - FIRST_H + STRIDE[0] - 1) // STRIDE[0]
    TAPS_W: tl.constexpr = (KERNEL[1] - FIRST_W + STRIDE[1] - 1) // STRIDE[1]
    OFFSET_H: tl.constexpr = (FIRST_H - PAD[0] - PLANE_H) // STRIDE[0]
    OFFSET_W: tl.constexpr = (FIRST_W - PAD[1] - PLANE_W) // STRIDE[1]
    K_BLOCKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    if TAPS_H * TAPS_W > 0:
        # constexpr trip count: with a run-time one ptxas serialises the wgmma (warning C7515)
        for step in tl.range(TAPS_H * TAPS_W * K_BLOCKS):
            k = step % K_BLOCKS * BLOCK_K
            j = step // K_BLOCKS % TAPS_W
            i = step // (K_BLOCKS * TAPS_W)
            tap = (FIRST_H + STRIDE[0] * i) * KERNEL[1] + FIRST_W + STRIDE[1] * j
            accs = _add_tap(
                accs, x_desc, w_desc, n, h + SIGN * (OFFSET_H + i), w + SIGN * (OFFSET_W + j), c, k, tap,
                C_OUT, C_IN, WEIGHT_T, BOX, BLOCK_C, BLOCK_K, PRECISION,
            )  # fmt: skip
    return accs


@triton.jit
def add_rows(
    accs,  # C_BLOCKS * ROWS accumulators [BLOCK_C, P]
    x_desc,  # [N, H, W, C_IN], box [BOX_N, 1, BOX_W, BLOCK_K]
    w_desc,  # as in add_plane
    n,
    h,
    w,
    c,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    KERNEL: tl.constexpr,
    PAD: tl.constexpr,
    SIGN: tl.constexpr,
    WEIGHT_T: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    C_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to accs all taps at stride 1. For each kernel column it loads each input row and each weight once.

    Adjacent output rows read the same input rows: with three taps, ROWS + 2 loads instead of 3 * ROWS.
    """
    TAPS: tl.constexpr = KERNEL[0]
    ABOVE: tl.constexpr = PAD[0] if SIGN == 1 else TAPS - 1 - PAD[0]  # rows of the input above the first output row
    K_BLOCKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    for step in tl.range(KERNEL[1] * K_BLOCKS):
        k = step % K_BLOCKS * BLOCK_K
        j = step // K_BLOCKS
        rows = ()
        for row in tl.static_range(ROWS + TAPS - 1):
            x = load_box(x_desc, n, h + row - ABOVE, w + SIGN * (j - PAD[1]), k, BOX, BLOCK_K, True, C_IN)
            rows += (x,)  # [BLOCK_K, P]
        sums = ()
        for block in tl.static_range(C_BLOCKS):
            weights = ()
            for i in tl.static_range(TAPS):  # weights: [BLOCK_C, BLOCK_K] each
                tap = i * KERNEL[1] + j
                weights += (_load_weight(w_desc, tap, c + block * BLOCK_C, k, C_OUT, C_IN, WEIGHT_T, BLOCK_C, BLOCK_K),)
            for row in tl.static_range(ROWS):
                acc = accs[block * ROWS + row]
                for i in tl.static_range(TAPS):
                    x = rows[row + i if SIGN == 1 else row + TAPS - 1 - i]
                    acc = tl.dot(weights[i], x, acc, input_precision=PRECISION)
                sums += (acc,)
        accs = sums
    return accs


@triton.jit
def longest_first(position, H, W):
    """Maps a position to (row, column): interior pixels (nine taps) first, then edges (six), then corners (four).

    Programs start in order, so the last ones are short, and all SMs finish at about the same time.
    """
    inner_h = H - 2
    inner_w = W - 2
    inside = inner_h * inner_w
    edge = position - inside
    corner = edge - 2 * (inner_h + inner_w)
    on_side = edge - 2 * inner_w  # left and right edge
    one_h = tl.maximum(inner_h, 1)  # an image of two rows has no interior; avoid division by zero
    one_w = tl.maximum(inner_w, 1)
    h = tl.where(
        position < inside,
        1 + position // one_w,
        tl.where(
            edge < 2 * inner_w,
            tl.where(edge < inner_w, 0, H - 1),
            tl.where(corner < 0, 1 + on_side % one_h, tl.where(corner < 2, 0, H - 1)),
        ),
    )
    w = tl.where(
        position < inside,
        1 + position % one_w,
        tl.where(
            edge < 2 * inner_w,
            1 + edge % one_w,
            tl.where(corner < 0, tl.where(on_side < inner_h, 0, W - 1), corner % 2 * (W - 1)),
        ),
    )
    return h, w


@triton.jit
def add_inside(
    accs,
    x_desc,
    w_desc,
    n,
    h,
    w,
    c,
    H,
    W,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    SIGN: tl.constexpr,
    WEIGHT_T: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to accs the taps of a 3x3 with padding 1 that read the image, for one pixel of many images."""
    # tap i reads row h + SIGN * (i - 1)
    first_i = (h == (0 if SIGN == 1 else H - 1)).to(tl.int32)
    first_j = (w == (0 if SIGN == 1 else W - 1)).to(tl.int32)
    columns = 3 - (w == 0).to(tl.int32) - (w == W - 1).to(tl.int32)
    taps = columns * (3 - (h == 0).to(tl.int32) - (h == H - 1).to(tl.int32))
    # consecutive loops, not one for each case: Triton doesn't reuse shared memory between mutually exclusive loops
    accs = _add_taps(
        accs, x_desc, w_desc, n, h, w, c, first_i, first_j, columns, 0, 4,
        C_OUT, C_IN, SIGN, WEIGHT_T, BOX, BLOCK_C, BLOCK_K, PRECISION,
    )  # fmt: skip
    if taps >= 6:
        accs = _add_taps(
            accs, x_desc, w_desc, n, h, w, c, first_i, first_j, columns, 4, 6,
            C_OUT, C_IN, SIGN, WEIGHT_T, BOX, BLOCK_C, BLOCK_K, PRECISION,
        )  # fmt: skip
    if taps == 9:
        accs = _add_taps(
            accs, x_desc, w_desc, n, h, w, c, first_i, first_j, columns, 6, 9,
            C_OUT, C_IN, SIGN, WEIGHT_T, BOX, BLOCK_C, BLOCK_K, PRECISION,
        )  # fmt: skip
    return accs


@triton.jit
def _add_taps(
    accs,
    x_desc,
    w_desc,
    n,
    h,
    w,
    c,
    first_i,
    first_j,
    columns,  # 2 or 3
    FIRST: tl.constexpr,  # first tap; the trip count is constexpr, as in add_plane
    LAST: tl.constexpr,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    SIGN: tl.constexpr,
    WEIGHT_T: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to accs taps FIRST to LAST of a rectangle of taps that starts at (first_i, first_j) of a 3x3."""
    K_BLOCKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    for step in tl.range((LAST - FIRST) * K_BLOCKS):
        k = step % K_BLOCKS * BLOCK_K
        t = FIRST + step // K_BLOCKS
        row = tl.where(columns == 3, t // 3, t // 2)
        i = first_i + row
        j = first_j + t - row * columns
        accs = _add_tap(
            accs, x_desc, w_desc, n, h + SIGN * (i - 1), w + SIGN * (j - 1), c, k, i * 3 + j,
            C_OUT, C_IN, WEIGHT_T, BOX, BLOCK_C, BLOCK_K, PRECISION,
        )  # fmt: skip
    return accs


@triton.jit
def sum_folded(
    planes,  # the parity planes [N, H / 2, W / 2, C_IN] of the input, box [BOX_N, BOX_H / 2, BOX_W / 2, BLOCK_K]
    w_ptr,
    n,
    h,
    w,
    c,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    SIGN: tl.constexpr,
    WEIGHT_STRIDES: tl.constexpr,  # of tap, output channel, input channel
    BOX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes [BLOCK_C, P] of a 3x3 with padding 1, as a 4x4 of stride 2 from pixels to blocks of 2x2 pixels.

    With h counting blocks, tap a of the four reads input row 2 * h - 1 + a = 2 * (h + d) + p. For output row 2 * h + q
    it is tap a - q of the three (data gradient: 2 - a + q), or none: 9 of 16 weights are nonzero.
    """
    K_BLOCKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    BLOCKS: tl.constexpr = BOX[0] * BOX[1] * BOX[2] // 4
    BLOCK_BOX: tl.constexpr = (BOX[0], BOX[1] // 2, BOX[2] // 2)
    row = tl.arange(0, 4 * BLOCK_C)  # rows of the product: (row and column of the pixel in its block, channel)
    q_h = row // (2 * BLOCK_C)
    q_w = row // BLOCK_C % 2
    channel = c + row % BLOCK_C
    acc = tl.zeros([4 * BLOCK_C, BLOCKS], dtype=tl.float32)
    # main loop: a step adds one tap of each plane; one loop per plane would fill the pipeline four times
    for step in tl.range(4 * K_BLOCKS):
        k = step % K_BLOCKS * BLOCK_K
        input_channel = k + tl.arange(0, BLOCK_K)
        for plane in tl.static_range(4):
            d_h = step // (2 * K_BLOCKS) - plane // 2
            d_w = step // K_BLOCKS % 2 - plane % 2
            # [BLOCK_K, BLOCKS]
            x = load_box(planes[plane], n, h // 2 + d_h, w // 2 + d_w, k, BLOCK_BOX, BLOCK_K, True, C_IN)
            i = 2 * d_h + plane // 2 + 1 - q_h
            j = 2 * d_w + plane % 2 + 1 - q_w
            is_tap = (i >= 0) & (i < 3) & (j >= 0) & (j < 3) & (channel < C_OUT)
            tap = i * 3 + j if SIGN == 1 else 8 - i * 3 - j
            offset = tap * WEIGHT_STRIDES[0] + channel * WEIGHT_STRIDES[1]
            # [4 * BLOCK_C, BLOCK_K] by pointers: a reshaped box of several taps would reach the product via registers
            weight = tl.load(
                w_ptr + offset[:, None] + input_channel[None, :] * WEIGHT_STRIDES[2],
                mask=is_tap[:, None] & (input_channel < C_IN)[None, :],
                other=0.0,
            )
            acc = tl.dot(weight, x, acc, input_precision=PRECISION)
    # unfold to [BLOCK_C, P]
    acc = acc.reshape([2, 2, BLOCK_C, BOX[0] * BOX[1] // 2, BOX[2] // 2])
    return acc.permute([2, 3, 0, 4, 1]).reshape([BLOCK_C, 4 * BLOCKS])  # no data moves


@triton.jit
def _add_tap(
    accs,
    x_desc,
    w_desc,
    n,
    h,
    w,
    c,
    k,
    tap,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    WEIGHT_T: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to accs one tap of BLOCK_K channels, read from the box at (n, h, w)."""
    x = load_box(x_desc, n, h, w, k, BOX, BLOCK_K, True, C_IN)  # [BLOCK_K, P]
    sums = ()
    for block in tl.static_range(len(accs)):
        weight = _load_weight(w_desc, tap, c + block * BLOCK_C, k, C_OUT, C_IN, WEIGHT_T, BLOCK_C, BLOCK_K)
        sums += (tl.dot(weight, x, accs[block], input_precision=PRECISION),)
    return sums


@triton.jit
def _load_weight(
    w_desc,
    tap,
    c,
    k,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    WEIGHT_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loads [BLOCK_C, BLOCK_K] of one tap's weight."""
    if WEIGHT_T:
        return load_matrix(w_desc, tap, k, c, BLOCK_K, BLOCK_C, True, C_IN, C_OUT)
    else:
        return load_matrix(w_desc, tap, c, k, BLOCK_C, BLOCK_K, False, C_OUT, C_IN)
