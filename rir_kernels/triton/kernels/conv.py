"""Convolution as an implicit GEMM with a fused epilogue: forward pass, inference and data gradient.

    acc[co, p] = sum over taps (i, j) and channels ci of  W[co, i, j, ci] * x[pixel p shifted by the tap, ci]

BLOCK_C counts output channels, BLOCK_K input channels (the reduction). Pixels are the right operand of `tl.dot`: a TMA
box of the channels-last input, reshaped to [P, BLOCK_K] and transposed, stays in swizzled shared memory in the layout
of Hopper's wgmma. Out-of-range coordinates read zero, which is the convolution's padding: no im2col, no masks.

Stride 2 is handled by parity. Row r of the input lies in plane p = r mod s at index r // s, so for a tap k of an axis
with stride s and padding P,

    forward        s * o + k - P = s * (o + d) + p        k = (p + P) mod s, + s, ...     d = (k - P - p) / s
    data gradient  s * i + p + P - k = s * (i + d)        the same taps k                 d = (p + P - k) / s

so the offsets d differ only in their sign, which SIGN selects. The forward pass sums over the planes of its input; the
data gradient computes one sum for each plane of its output (`dgrad`). At stride 1 there is one plane, and the data
gradient uses the forward kernel, with the ORIGINAL weight read transposed. (With few channels, 2x2 blocks of pixels are
computed as a convolution of stride 2: `conv_loops.sum_folded`.)

The epilogue computes, in this order, each part optional:

    z = branch_scale * (acc + bias) + addends             ("pre_norm"; the addends carry the identity)
    per-tile mean, M2 and count of z                      (training)
    y = act(norm(z))  or  act(branch_scale * norm(acc + bias) + addends)    (inference; the latter under "post_norm")
    per-tile sum of dy' and of dy' * xhat, where dx = dy of the layer upstream  (data gradient; defined in `batchnorm`)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from rir_kernels.triton.kernels.activations import activate, activation_grad
from rir_kernels.triton.kernels.conv_loops import add_inside, add_plane, add_rows, longest_first, sum_folded
from rir_kernels.triton.kernels.pointwise import load_channels, normalize, pdl_wait
from rir_kernels.triton.kernels.tma import load_box, round_as


class Norm(NamedTuple):
    """The norm at inference: [C_OUT] each, gamma and beta optional, and eps. Without a norm all are None."""

    mean: Any = None
    var: Any = None
    gamma: Any = None
    beta: Any = None
    eps: float | None = None


class Moments(NamedTuple):
    """Where the statistics of z go in training: mean and M2 [tiles, C_OUT], count [tiles], fp32. Otherwise None."""

    mean: Any = None
    m2: Any = None
    count: Any = None


class UpstreamNorm(NamedTuple):
    """Data gradient: the norm of the layer upstream, whose y is this layer's x, [C_OUT] each. Otherwise all are None.

    sums: [tiles, 2, C_OUT] fp32, where its sum of dy' and sum of dy' * xhat go.
    """

    mean: Any = None
    invstd: Any = None
    gamma: Any = None
    beta: Any = None
    sums: Any = None


@triton.jit
def load_addend(desc, n, h, w, c, BOX: tl.constexpr, BLOCK_C: tl.constexpr):
    """Loads [BLOCK_C, P] fp32 of an addend; channels and pixels out of its range read zero."""
    return load_box(desc, n, h, w, c, BOX, BLOCK_C, True).to(tl.float32)


@triton.jit
def _add_residuals(acc, branch_scale, addend0_desc, addend1_desc, n, h, w, c, BOX: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns branch_scale * acc + addends."""
    if branch_scale is not None:
        acc *= branch_scale
    if addend0_desc is not None:
        acc += load_addend(addend0_desc, n, h, w, c, BOX, BLOCK_C)
    if addend1_desc is not None:
        acc += load_addend(addend1_desc, n, h, w, c, BOX, BLOCK_C)
    return acc


@triton.jit
def pixels(n, h, w, N, H, W, stride_n, stride_h, stride_w, BOX: tl.constexpr):
    """Returns (mask of the tile's pixels that lie in the image, their offsets), [P] each."""
    pixel = tl.arange(0, BOX[0] * BOX[1] * BOX[2])
    pixel_n = n + pixel // (BOX[1] * BOX[2])
    pixel_h = h + pixel // BOX[2] % BOX[1]
    pixel_w = w + pixel % BOX[2]
    is_pixel = (pixel_n < N) & (pixel_h < H) & (pixel_w < W)
    return is_pixel, pixel_n.to(tl.int64) * stride_n + pixel_h.to(tl.int64) * stride_h + pixel_w.to(tl.int64) * stride_w


@triton.jit
def _zero_beyond(accs, n, h, w, N, H, W, BOX: tl.constexpr, C_BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """Returns accs with zeros at pixels outside the image."""
    masked = ()
    for block in tl.static_range(C_BLOCKS):
        for row in tl.static_range(ROWS):
            is_pixel, _ = pixels(n, h + row, w, N, H, W, 0, 0, 0, BOX)
            masked += (tl.where(is_pixel[None, :], accs[block * ROWS + row], 0.0),)
    return masked


@triton.jit
def store_tile(
    out, tile, n, h, w, c, pixel_offset, channel, mask, C_OUT: tl.constexpr, BOX: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Stores [BLOCK_C, P] by descriptor, or by pointers if the GPU or the alignment rules out a descriptor."""
    if isinstance(out, tl.tensor_descriptor):
        out.store([n, h, w, c], tile.to(out.dtype).T.reshape([BOX[0], BOX[1], BOX[2], BLOCK_C]))
    else:
        if C_OUT % (128 // out.dtype.element_ty.primitive_bitwidth) == 0:
            pixel_offset = tl.multiple_of(pixel_offset, 128 // out.dtype.element_ty.primitive_bitwidth)
        tl.store(out + pixel_offset[None, :] + channel[:, None], tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _moments(tiles, count, n, h, w, N, H, W, BOX: tl.constexpr, IS_ZERO_BEYOND: tl.constexpr):
    """Computes mean and M2 [BLOCK_C] over the valid pixels of vertically adjacent tiles [BLOCK_C, P]."""
    total = tl.zeros([tiles[0].shape[0]], dtype=tl.float32)
    for row in tl.static_range(len(tiles)):
        if IS_ZERO_BEYOND:
            total += tl.sum(tiles[row], 1)
        else:
            is_pixel, _ = pixels(n, h + row, w, N, H, W, 0, 0, 0, BOX)
            total += tl.sum(tl.where(is_pixel[None, :], tiles[row], 0.0), 1)
    mean = total / tl.maximum(count, 1.0)
    m2 = tl.zeros_like(mean)
    for row in tl.static_range(len(tiles)):
        is_pixel, _ = pixels(n, h + row, w, N, H, W, 0, 0, 0, BOX)
        deviation = tl.where(is_pixel[None, :], tiles[row] - mean[:, None], 0.0)
        m2 += tl.sum(deviation * deviation, 1)
    return mean, m2


@triton.jit
def _upstream_sums(dy, z, mean, invstd, gamma, beta, ACT: tl.constexpr):
    """Sums dy' and dy' * xhat over a tile [BLOCK_C, P], as `batchnorm` does; returns [BLOCK_C] each.

    dy is zero outside the image. The sum is multiplied by invstd, not its terms: xhat may be infinite outside the
    image, z - mean is not.
    """
    if ACT is not None:
        u = normalize(z, mean[:, None], invstd[:, None], gamma[:, None], beta[:, None])
        dy = activation_grad(dy, u, ACT)
    return tl.sum(dy, 1), tl.sum(dy * (z - mean[:, None]), 1) * invstd


@triton.jit
def _store(out, tile, n, h, w, c, channel, N, H, W, C_OUT: tl.constexpr, BOX: tl.constexpr, BLOCK_C: tl.constexpr):
    """Stores [BLOCK_C, P] of a dense [N, H, W, C_OUT]."""
    is_pixel, offset = pixels(n, h, w, N, H, W, H.to(tl.int64) * (W * C_OUT), W * C_OUT, C_OUT, BOX)  # [P]
    mask = (channel < C_OUT)[:, None] & is_pixel[None, :]
    store_tile(out, tile, n, h, w, c, offset, channel, mask, C_OUT, BOX, BLOCK_C)


@triton.jit
def _load_norm(norm, channel, C_OUT: tl.constexpr):
    """Loads mean, invstd, gamma and beta, [BLOCK_C] each."""
    mean = load_channels(norm.mean, channel, C_OUT, 0.0)
    invstd = 1.0 / tl.sqrt_rn(load_channels(norm.var, channel, C_OUT, 1.0) + norm.eps)
    gamma = load_channels(norm.gamma, channel, C_OUT, 1.0)
    beta = load_channels(norm.beta, channel, C_OUT, 0.0)
    return mean, invstd, gamma, beta


@triton.jit
def _store_moments(
    moments, tiles, tile, count, n, h, w, c, channel, N, H, W,
    C_OUT: tl.constexpr, BOX: tl.constexpr, IS_ZERO_BEYOND: tl.constexpr,
):  # fmt: skip
    """Training: stores the statistics of z over the valid pixels of vertically adjacent tiles [BLOCK_C, P]."""
    mean, m2 = _moments(tiles, count.to(tl.float32), n, h, w, N, H, W, BOX, IS_ZERO_BEYOND)  # [BLOCK_C]
    offset = tile.to(tl.int64) * C_OUT
    tl.store(moments.mean + offset + channel, mean, mask=channel < C_OUT)
    tl.store(moments.m2 + offset + channel, m2, mask=channel < C_OUT)
    tl.store(moments.count + tile, count.to(tl.float32), mask=c == 0)


@triton.jit
def _store_activations(
    out, z_out, tiles, mean, invstd, gamma, beta, branch_scale, addend0_desc, addend1_desc, x_desc,
    n, h, w, c, channel, N, H, W,
    C_OUT: tl.constexpr, POST_NORM: tl.constexpr, ACT: tl.constexpr, BOX: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Inference: normalizes and activates z of vertically adjacent tiles [BLOCK_C, P]; stores y, and z for backward."""
    for row in tl.static_range(len(tiles)):
        y = tiles[row]
        if z_out is not None:
            # backward recomputes the pre-activation from the stored z, so compute y from the same rounded value
            y = round_as(y, x_desc)
            _store(z_out, y, n, h + row, w, c, channel, N, H, W, C_OUT, BOX, BLOCK_C)
        y = normalize(y, mean[:, None], invstd[:, None], gamma[:, None], beta[:, None])
        if POST_NORM:
            y = _add_residuals(y, branch_scale, addend0_desc, addend1_desc, n, h + row, w, c, BOX, BLOCK_C)
        y = activate(y, ACT)
        _store(out, y, n, h + row, w, c, channel, N, H, W, C_OUT, BOX, BLOCK_C)


@triton.jit
def _store_gradient_and_sums(
    out, tiles, upstream_desc, upstream, tile, x_desc, n, h, w, c, channel, N, H, W,
    C_OUT: tl.constexpr, ACT: tl.constexpr, BOX: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Data gradient: stores dx, vertically adjacent tiles [BLOCK_C, P], and its sums for the norm upstream."""
    sum_dy = tl.zeros([BLOCK_C], dtype=tl.float32)
    sum_dy_xhat = tl.zeros([BLOCK_C], dtype=tl.float32)
    for row in tl.static_range(len(tiles)):
        dy = round_as(tiles[row], x_desc)  # sum the values as they are stored
        _store(out, dy, n, h + row, w, c, channel, N, H, W, C_OUT, BOX, BLOCK_C)
        z = load_addend(upstream_desc, n, h + row, w, c, BOX, BLOCK_C)
        mean = load_channels(upstream.mean, channel, C_OUT, 0.0)
        invstd = load_channels(upstream.invstd, channel, C_OUT, 1.0)
        gamma = load_channels(upstream.gamma, channel, C_OUT, 1.0)
        beta = load_channels(upstream.beta, channel, C_OUT, 0.0)
        row_dy, row_dy_xhat = _upstream_sums(dy, z, mean, invstd, gamma, beta, ACT)
        sum_dy += row_dy
        sum_dy_xhat += row_dy_xhat
    sums = upstream.sums + tile.to(tl.int64) * (2 * C_OUT) + channel
    tl.store(sums, sum_dy, mask=channel < C_OUT)
    tl.store(sums + C_OUT, sum_dy_xhat, mask=channel < C_OUT)


@triton.jit(do_not_specialize=["N", "H", "W", "TILES_H", "TILES_W", "branch_scale"])  # one compile for all image sizes
def _conv_fwd_kernel(
    x00_desc,  # the parity planes [N, H_plane, W_plane, C_IN] of the input; stride 1 has only the first; absent ones
    x01_desc,  # are None; FOLD_2X2 has all four
    x10_desc,
    x11_desc,
    w_desc,  # FOLD_2X2: a pointer
    addend0_desc,  # [N, H, W, <= C_OUT] or None
    addend1_desc,
    out,  # [N, H, W, C_OUT], dense: a descriptor or a pointer
    z_out,  # the same for z, at inference if backward will need it; or None
    bias_ptr,  # [C_OUT] or None
    # tuples of pointers and floats only: Triton's launcher doesn't encode descriptors in them, and specializes integers
    norm,  # Norm
    moments,  # Moments
    upstream_desc,  # data gradient: z [N, H, W, C_OUT] of the layer upstream, or None
    upstream,  # UpstreamNorm
    N,
    H,
    W,
    TILES_H,
    TILES_W,
    branch_scale,  # None: 1. Without an addend to fuse with, the product would take registers next to the accumulator's
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    CONV: tl.constexpr,  # (kernel, stride, padding), each (h, w)
    SIGN: tl.constexpr,  # 1: forward; -1: the data gradient at stride 1
    WEIGHT_T: tl.constexpr,
    POST_NORM: tl.constexpr,
    ACT: tl.constexpr,  # of y, as in `activations`; in the data gradient, of the layer upstream
    BOX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    C_BLOCKS: tl.constexpr,  # blocks of BLOCK_C channels computed from one load of the pixels
    ROWS: tl.constexpr,  # output rows that share loads of input rows and weights; if > 1, BOX has one row
    SKIP_PADDING: tl.constexpr,  # skips the taps that would read padding; BOX is then one pixel of many images
    # folds blocks of 2x2 pixels into the rows of the product, BOX then has even sides: the weight's strides of tap,
    # C_OUT and C_IN; or None
    FOLD_2X2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_wait(USE_PDL)
    KERNEL: tl.constexpr = CONV[0]
    STRIDE: tl.constexpr = CONV[1]
    PAD: tl.constexpr = CONV[2]
    # prologue: which tile of pixels, which channels
    P: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    TILES_C: tl.constexpr = (C_OUT + C_BLOCKS * BLOCK_C - 1) // (C_BLOCKS * BLOCK_C)
    pid = tl.program_id(0)
    tile = pid // TILES_C  # the channel tiles of a pixel tile are neighbours and share it in L2
    first_c = pid % TILES_C * (C_BLOCKS * BLOCK_C)
    if SKIP_PADDING:
        tiles_n = (N + BOX[0] - 1) // BOX[0]
        h, w = longest_first(tile // tiles_n, H, W)
        n = tile % tiles_n * BOX[0]
    else:
        w = tile % TILES_W * BOX[2]
        h = tile // TILES_W % TILES_H * (BOX[1] * ROWS)
        n = tile // (TILES_W * TILES_H) * BOX[0]

    # main loop: C_BLOCKS * ROWS accumulators [BLOCK_C, P]
    accs = ()
    for _ in tl.static_range(C_BLOCKS * ROWS):
        accs += (tl.zeros([BLOCK_C, P], dtype=tl.float32),)
    planes = (x00_desc, x01_desc, x10_desc, x11_desc)
    if FOLD_2X2 is not None:
        sums = sum_folded(
            planes, w_desc, n, h, w, first_c, C_OUT, C_IN, SIGN,
            FOLD_2X2, BOX, BLOCK_C, BLOCK_K, PRECISION,
        )  # fmt: skip
        accs = (sums,)
    elif SKIP_PADDING:
        accs = add_inside(
            accs, x00_desc, w_desc, n, h, w, first_c, H, W, C_OUT, C_IN, SIGN,
            WEIGHT_T, BOX, BLOCK_C, BLOCK_K, PRECISION,
        )  # fmt: skip
    elif ROWS > 1:
        accs = add_rows(
            accs, x00_desc, w_desc, n, h, w, first_c, C_OUT, C_IN, KERNEL, PAD, SIGN,
            WEIGHT_T, BOX, BLOCK_C, C_BLOCKS, ROWS, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        for plane in tl.static_range(4):
            if planes[plane] is not None:
                accs = add_plane(
                    accs, planes[plane], w_desc, n, h, w, first_c, C_OUT, C_IN, KERNEL, STRIDE, PAD,
                    plane // 2, plane % 2, SIGN, WEIGHT_T, BOX, BLOCK_C, BLOCK_K, PRECISION,
                )  # fmt: skip

    # epilogue. The number of valid pixels; a row below the image has zero or fewer
    count = tl.minimum(BOX[0], N - n) * tl.minimum(BOX[1] * ROWS, H - h) * tl.minimum(BOX[2], W - w)
    IS_ZERO_BEYOND: tl.constexpr = upstream.sums is not None or (
        moments.mean is not None and bias_ptr is None and C_BLOCKS > 1
    )
    if IS_ZERO_BEYOND:
        # mask here, before the addends, which are zero there: masks in the sums would take too many registers
        if count < P * ROWS:
            accs = _zero_beyond(accs, n, h, w, N, H, W, BOX, C_BLOCKS, ROWS)
    for block in tl.static_range(C_BLOCKS):
        c = first_c + block * BLOCK_C
        channel = c + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        if norm.mean is not None:
            # load these before the addends, which would otherwise occupy registers for longer
            mean, invstd, gamma, beta = _load_norm(norm, channel, C_OUT)
        # z: bias, and addends under "pre_norm"
        tiles = ()
        for row in tl.static_range(ROWS):
            acc = accs[block * ROWS + row]
            if bias_ptr is not None:
                acc += load_channels(bias_ptr, channel, C_OUT, 0.0)[:, None]
            if not POST_NORM:
                acc = _add_residuals(acc, branch_scale, addend0_desc, addend1_desc, n, h + row, w, c, BOX, BLOCK_C)
            tiles += (acc,)  # [BLOCK_C, P]

        if moments.mean is not None:
            _store_moments(
                moments, tiles, tile, count, n, h, w, c, channel, N, H, W, C_OUT, BOX, IS_ZERO_BEYOND
            )  # fmt: skip
        if norm.mean is not None:
            _store_activations(
                out, z_out, tiles, mean, invstd, gamma, beta, branch_scale, addend0_desc, addend1_desc, x00_desc,
                n, h, w, c, channel, N, H, W, C_OUT, POST_NORM, ACT, BOX, BLOCK_C,
            )  # fmt: skip
        elif upstream.sums is not None:
            _store_gradient_and_sums(
                out, tiles, upstream_desc, upstream, tile, x00_desc, n, h, w, c, channel, N, H, W,
                C_OUT, ACT, BOX, BLOCK_C,
            )  # fmt: skip
        else:
            for row in tl.static_range(ROWS):
                _store(out, tiles[row], n, h + row, w, c, channel, N, H, W, C_OUT, BOX, BLOCK_C)
