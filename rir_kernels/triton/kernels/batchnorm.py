"""Batch normalization, split at the reduction: statistics | merge | apply, and in backward reduce | sum | apply.

All kernels see activations as rows [M, C], M = N*H*W pixels of a channels-last tensor. With n pixels per channel and

    xhat = (z - mean) * invstd,    u = branch_scale * (gamma * xhat + beta) + residual,    y = act(u)
    dy'  = dy * act'(u)            (u is recomputed from z; if a residual was added after the norm, y is read: its sign
                                   gives ReLU's derivative)

the gradients are, with s1 = branch_scale * sum(dy') and s2 = branch_scale * sum(dy' * xhat),

    dbeta = s1,   dgamma = s2,   dz = gamma * invstd * (branch_scale * dy' - s1 / n - xhat * s2 / n)

(Ioffe and Szegedy 2015, section 3). If forward used the running statistics, the s1 and s2 terms drop out of dz. If the
following layer's data-gradient kernel computes dy, it can also compute both sums (`conv`); no reduce kernel runs then.
"""

import triton
import triton.language as tl

from rir_kernels.triton.kernels.activations import activate, activation_grad
from rir_kernels.triton.kernels.pointwise import (
    load_channels,
    merge_moments,
    normalize,
    pdl_wait,
    tile_moments,
)


@triton.jit(do_not_specialize=["M", "steps"])
def _bn_stats_fwd_kernel(
    z_ptr,  # [M, C]
    tile_mean_ptr,  # [tiles, C] fp32
    tile_m2_ptr,
    tile_count_ptr,  # [tiles] fp32
    M,
    steps,  # row blocks per program
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Computes mean, M2 and count of z for each tile of steps * BLOCK_M rows."""
    pdl_wait(USE_PDL)
    # prologue: which tile of rows, which channels
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile = pid // BLOCKS_C
    channel = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < C
    count = 0.0
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    # main loop: merge the moments of one row block after the other
    for step in tl.range(steps):
        first = (tile.to(tl.int64) * steps + step) * BLOCK_M
        row = first + tl.arange(0, BLOCK_M)
        is_row = row < M
        mask = is_row[:, None] & is_channel[None, :]
        z = tl.load(z_ptr + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        rows = tl.maximum(tl.minimum(M - first, BLOCK_M), 0).to(tl.float32)  # valid rows of this block
        block_mean, block_m2 = tile_moments(z, is_row[:, None], rows, 0)
        count, mean, m2 = merge_moments(count, mean, m2, rows, block_mean, block_m2)
    # store
    out = tile.to(tl.int64) * C + channel
    tl.store(tile_mean_ptr + out, mean, mask=is_channel)
    tl.store(tile_m2_ptr + out, m2, mask=is_channel)
    tl.store(tile_count_ptr + tile, count, mask=pid % BLOCKS_C == 0)


@triton.jit(do_not_specialize=["tiles", "eps", "momentum"])
def _bn_finalize_fwd_kernel(
    tile_mean_ptr,  # [tiles, C] fp32
    tile_m2_ptr,
    tile_count_ptr,  # [tiles] fp32
    mean_ptr,  # [C] fp32
    var_ptr,  # [C] fp32, biased; M2 instead if invstd_ptr is None
    invstd_ptr,  # [C] fp32; or None
    count_ptr,  # fp32; or None
    running_mean_ptr,  # [C], any float type, updated in place; or None
    running_var_ptr,  # [C], unbiased
    batches_ptr,  # int64, incremented; or None
    tiles,
    eps,
    momentum,
    C: tl.constexpr,
    STRIDE: tl.constexpr,  # between tiles
    COUNT_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Merges the tiles' moments in tile order, then updates the running statistics with the batch's."""
    pdl_wait(USE_PDL)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < C
    count = 0.0
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    # main loop: BLOCK_T tiles per step
    for first in tl.range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        is_tile = tile < tiles
        mask = is_tile[:, None] & is_channel[None, :]
        offset = tile[:, None] * STRIDE + channel[None, :]  # tiles have >= 64 pixels: 32 bits suffice for 2^37 elements
        weight = tl.load(tile_count_ptr + tile * COUNT_STRIDE, mask=is_tile, other=0.0)[:, None]  # [BLOCK_T, 1]
        tile_mean = tl.load(tile_mean_ptr + offset, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_C]
        block_count = tl.sum(tl.sum(weight, 1), 0)
        # sum deviations from a nonempty tile's mean: they are small even if the means are large
        fullest = first + tl.argmax(tl.sum(weight, 1), 0)
        anchor = tl.load(tile_mean_ptr + fullest * STRIDE + channel, mask=is_channel, other=0.0)
        shift = tl.where(is_tile[:, None], tile_mean - anchor[None, :], 0.0)
        block_shift = tl.sum(weight * shift, 0) / tl.maximum(block_count, 1.0)
        deviation = tl.where(is_tile[:, None], shift - block_shift[None, :], 0.0)
        # load as late as possible: an earlier load would occupy registers until here
        tile_m2 = tl.load(tile_m2_ptr + offset, mask=mask, other=0.0)
        block_m2 = tl.sum(tile_m2 + weight * deviation * deviation, 0)
        count, mean, m2 = merge_moments(count, mean, m2, block_count, anchor + block_shift, block_m2)
    # store the batch's statistics
    tl.store(mean_ptr + channel, mean, mask=is_channel)
    if invstd_ptr is None:
        tl.store(var_ptr + channel, m2, mask=is_channel)
    else:
        var = m2 / count
        tl.store(var_ptr + channel, var, mask=is_channel)
        tl.store(invstd_ptr + channel, 1.0 / tl.sqrt_rn(var + eps), mask=is_channel)
    if count_ptr is not None:
        tl.store(count_ptr, count, mask=tl.program_id(0) == 0)
    # update the running statistics
    if running_mean_ptr is not None:
        momentum = tl.where(count > 0, momentum, 0.0)  # keep them if no rank has a pixel
        _update_running(running_mean_ptr + channel, mean, momentum, is_channel)
        _update_running(running_var_ptr + channel, m2 / tl.maximum(count - 1.0, 1.0), momentum, is_channel)
    if batches_ptr is not None:
        is_first = tl.program_id(0) == 0
        tl.store(batches_ptr, tl.load(batches_ptr, mask=is_first, other=0) + 1, mask=is_first)


@triton.jit
def _update_running(ptr, batch, momentum, mask):
    running = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    running = (1.0 - momentum) * running + momentum * batch
    tl.store(ptr, running.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["eps"])
def _bn_running_fwd_kernel(
    running_mean_ptr,  # [C], any float type
    running_var_ptr,
    mean_ptr,  # [C] fp32
    invstd_ptr,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Converts the running statistics to the fp32 mean and invstd that backward reads."""
    pdl_wait(USE_PDL)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = load_channels(running_mean_ptr, channel, C, 0.0)
    var = load_channels(running_var_ptr, channel, C, 1.0)
    tl.store(mean_ptr + channel, mean, mask=channel < C)
    tl.store(invstd_ptr + channel, 1.0 / tl.sqrt_rn(var + eps), mask=channel < C)


@triton.jit
def _load_rows(ptr, row, channel, stride, C, mask):
    """Returns [BLOCK_M, BLOCK_C] fp32; channels past C read zero."""
    mask = mask & (channel < C)[None, :]
    return tl.load(ptr + row[:, None] * stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_norm(mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, channel, C):
    """Returns mean, invstd, gamma and beta, each [1, BLOCK_C] fp32."""
    mean = load_channels(mean_ptr, channel, C, 0.0)[None, :]
    invstd = load_channels(invstd_ptr, channel, C, 1.0)[None, :]
    gamma = load_channels(gamma_ptr, channel, C, 1.0)[None, :]
    beta = load_channels(beta_ptr, channel, C, 0.0)[None, :]
    return mean, invstd, gamma, beta


@triton.jit(do_not_specialize=["M", "branch_scale"])
def _bn_apply_fwd_kernel(
    z_ptr,  # [M, C]
    residual0_ptr,  # [M, C_RES0] rows residual0_stride apart, or None
    residual1_ptr,
    y_ptr,  # [M, C]
    mean_ptr,  # [C] fp32
    invstd_ptr,
    gamma_ptr,  # [C] or None
    beta_ptr,
    M,
    residual0_stride,
    residual1_stride,
    branch_scale,
    C: tl.constexpr,
    C_RES0: tl.constexpr,
    C_RES1: tl.constexpr,
    ACT: tl.constexpr,  # as in `activations`
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Computes y = act(u)."""
    pdl_wait(USE_PDL)
    # prologue: which tile
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    row = (pid // BLOCKS_C).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row = (row < M)[:, None]
    mean, invstd, gamma, beta = _load_norm(mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, channel, C)
    z = _load_rows(z_ptr, row, channel, C, C, is_row)  # [BLOCK_M, BLOCK_C]
    y = normalize(z, mean, invstd, gamma, beta) * branch_scale
    if residual0_ptr is not None:
        y += _load_rows(residual0_ptr, row, channel, residual0_stride, C_RES0, is_row)
    if residual1_ptr is not None:
        y += _load_rows(residual1_ptr, row, channel, residual1_stride, C_RES1, is_row)
    y = activate(y, ACT)
    mask = is_row & (channel < C)[None, :]
    tl.store(y_ptr + row[:, None] * C + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pre_activation_grad(
    dy_ptr, y_ptr, row, channel, is_row, dy_stride, z, mean, invstd, gamma, beta, C: tl.constexpr, ACT: tl.constexpr
):
    """Computes dy' [BLOCK_M, BLOCK_C] as defined in the module docstring."""
    dy = _load_rows(dy_ptr, row, channel, dy_stride, C, is_row)
    if ACT is not None:
        if y_ptr is not None:
            u = _load_rows(y_ptr, row, channel, C, C, is_row)
        else:
            u = normalize(z, mean, invstd, gamma, beta)
        dy = activation_grad(dy, u, ACT)
    return dy


@triton.jit(do_not_specialize=["M", "steps"])
def _bn_reduce_bwd_kernel(
    dy_ptr,  # [M, C] rows dy_stride apart
    z_ptr,  # [M, C]
    y_ptr,  # [M, C], of the sign of u; None: u is recomputed from z
    mean_ptr,  # [C] fp32
    invstd_ptr,
    gamma_ptr,  # [C] or None
    beta_ptr,
    partial_ptr,  # [splits, 2, C] fp32: sum dy', sum dy' * xhat
    M,
    steps,  # row blocks per program
    dy_stride,
    C: tl.constexpr,
    ACT: tl.constexpr,  # as in `activations`
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Computes partial sums of dy' and dy' * xhat, one pair for each split of steps * BLOCK_M rows."""
    pdl_wait(USE_PDL)
    # prologue: which split, which channels
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    split = pid // BLOCKS_C
    channel = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, invstd, gamma, beta = _load_norm(mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, channel, C)
    sum_dy = tl.zeros([BLOCK_C], dtype=tl.float32)
    sum_dy_xhat = tl.zeros([BLOCK_C], dtype=tl.float32)
    # main loop: row blocks
    for step in tl.range(steps):
        row = (split.to(tl.int64) * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = (row < M)[:, None]
        z = _load_rows(z_ptr, row, channel, C, C, is_row)
        dy = _pre_activation_grad(dy_ptr, y_ptr, row, channel, is_row, dy_stride, z, mean, invstd, gamma, beta, C, ACT)
        sum_dy += tl.sum(dy, 0)
        # rows past the end have dy = 0, but xhat = -mean * invstd may be infinite there
        sum_dy_xhat += tl.sum(tl.where(is_row, dy * ((z - mean) * invstd), 0.0), 0)
    # store
    out = partial_ptr + split.to(tl.int64) * (2 * C) + channel
    tl.store(out, sum_dy, mask=channel < C)
    tl.store(out + C, sum_dy_xhat, mask=channel < C)


@triton.jit(do_not_specialize=["splits", "scale"])
def _bn_sum_bwd_kernel(
    partial_ptr,  # [splits, 2, C] fp32
    dbeta_ptr,  # [C] fp32: s1
    dgamma_ptr,  # s2
    count_ptr,  # fp32 divisor of the sums; or None
    splits,
    scale,
    C: tl.constexpr,
    STRIDE: tl.constexpr,  # between the two sums, and from there to the next split
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Adds the splits' sums in a fixed order, so that runs are bit-identical."""
    pdl_wait(USE_PDL)
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    which = pid // BLOCKS_C  # 0: s1, 1: s2
    channel = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < C
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for first in tl.range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        offset = (2 * split + which)[:, None] * STRIDE + channel[None, :]
        mask = (split < splits)[:, None] & is_channel[None, :]
        total += tl.sum(tl.load(partial_ptr + offset, mask=mask, other=0.0), 0)
    total *= scale
    if count_ptr is not None:
        total /= tl.load(count_ptr)
    tl.store(dbeta_ptr + channel, total, mask=is_channel & (which == 0))
    tl.store(dgamma_ptr + channel, total, mask=is_channel & (which == 1))


@triton.jit(do_not_specialize=["M", "inv_count", "branch_scale"])
def _bn_apply_bwd_kernel(
    dy_ptr,  # [M, C] rows dy_stride apart
    z_ptr,  # [M, C]
    y_ptr,  # as in _bn_reduce_bwd_kernel
    dz_ptr,  # [M, C]
    dres_ptr,  # [M, C]: dy', the gradient of a residual added after the norm; or None
    dbeta_ptr,  # [C] fp32: s1; or None if forward used the running statistics
    dgamma_ptr,  # s2
    mean_ptr,  # [C] fp32
    invstd_ptr,
    gamma_ptr,  # [C] or None
    beta_ptr,
    M,
    dy_stride,
    inv_count,  # 1 / n; 0 if forward used the running statistics: s1 and s2 drop out
    branch_scale,
    C: tl.constexpr,
    ACT: tl.constexpr,  # as in `activations`
    BATCH_STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Computes dz, and the gradient of a residual added after the norm."""
    pdl_wait(USE_PDL)
    # prologue: which tile
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    row = (pid // BLOCKS_C).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row = (row < M)[:, None]  # [BLOCK_M, 1]
    mask = is_row & (channel < C)[None, :]
    mean, invstd, gamma, beta = _load_norm(mean_ptr, invstd_ptr, gamma_ptr, beta_ptr, channel, C)
    z = _load_rows(z_ptr, row, channel, C, C, is_row)
    dy = _pre_activation_grad(dy_ptr, y_ptr, row, channel, is_row, dy_stride, z, mean, invstd, gamma, beta, C, ACT)
    offset = row[:, None] * C + channel[None, :]  # [BLOCK_M, BLOCK_C], as z and dy
    if dres_ptr is not None:
        tl.store(dres_ptr + offset, dy.to(dres_ptr.dtype.element_ty), mask=mask)
    if dz_ptr is not None:
        dz = dy * branch_scale
        if BATCH_STATS:
            s1 = load_channels(dbeta_ptr, channel, C, 0.0)[None, :]
            s2 = load_channels(dgamma_ptr, channel, C, 0.0)[None, :]
            dz -= (s1 + (z - mean) * invstd * s2) * inv_count
        dz *= gamma * invstd
        tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=mask)
