"""Launches the normalization kernels. Activations are (N, C, H, W) in dense channels_last, read as rows [N*H*W, C]."""

from dataclasses import dataclass

import torch

from rir_kernels.layout import empty_channels_last
from rir_kernels.triton.batchnorm import (
    _bn_apply_bwd_kernel,
    _bn_apply_fwd_kernel,
    _bn_finalize_fwd_kernel,
    _bn_reduce_bwd_kernel,
    _bn_running_fwd_kernel,
    _bn_stats_fwd_kernel,
)
from rir_kernels.triton.config import power_of_two_at_least, rows_config
from rir_kernels.triton.cost import cdiv
from rir_kernels.triton.launch.partials import sum_partials
from rir_kernels.triton.launch.runtime import device_guard, launch


@dataclass(frozen=True)
class TileMoments:
    """Statistics of disjoint tiles: mean and M2 [tiles, C], count [tiles], all fp32."""

    mean: torch.Tensor
    m2: torch.Tensor
    count: torch.Tensor

    @classmethod
    def empty(cls, tiles: int, channels: int, device) -> "TileMoments":
        mean, m2 = torch.empty((2, tiles, channels), dtype=torch.float32, device=device)
        return cls(mean, m2, torch.empty(tiles, dtype=torch.float32, device=device))


@dataclass(frozen=True)
class Statistics:
    """mean, biased var (None: not kept) and 1/sqrt(var + eps) per channel, fp32."""

    mean: torch.Tensor
    var: torch.Tensor | None
    invstd: torch.Tensor


def bn_stats(z) -> TileMoments:
    """Statistics of a tensor that no kernel of ours wrote."""
    c = z.shape[1]
    rows = z.numel() // c
    config = rows_config(rows, c)
    tiles = cdiv(rows, config.block_m * config.steps)
    moments = TileMoments.empty(tiles, c, z.device)
    with device_guard(z):
        launch(
            _bn_stats_fwd_kernel, tiles * cdiv(c, config.block_c),
            z, moments.mean, moments.m2, moments.count, rows, config.steps,
            C=c, BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return moments


def bn_finalize(
    moments: TileMoments, eps: float, *, running_mean=None, running_var=None, batches=None, momentum: float = 0.0
) -> Statistics:
    """Merges the tiles in their order; running statistics and the count of batches are updated where they are given."""
    tiles, c = moments.mean.shape
    # three buffers, not slices of one: they are outputs of an op, which must not alias
    mean, var, invstd = (torch.empty(c, dtype=torch.float32, device=moments.mean.device) for _ in range(3))
    # few programs, which wait for memory: as many tiles at a time as registers hold
    block_t, block_c = min(2048, power_of_two_at_least(tiles)), 8
    with device_guard(mean):
        launch(
            _bn_finalize_fwd_kernel, cdiv(c, block_c),
            moments.mean, moments.m2, moments.count, mean, var, invstd, running_mean, running_var, batches,
            tiles, float(eps), momentum,
            C=c, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=8 if block_t >= 1024 else 4,
        )  # fmt: skip
    return Statistics(mean, var, invstd)


def bn_running(running_mean, running_var, eps: float) -> Statistics:
    """The running statistics as they are now: the buffers may change before backward runs."""
    c = running_mean.numel()
    mean, invstd = (torch.empty(c, dtype=torch.float32, device=running_mean.device) for _ in range(2))
    block_c = 256
    with device_guard(mean):
        launch(
            _bn_running_fwd_kernel, cdiv(c, block_c), running_mean, running_var, mean, invstd, float(eps),
            C=c, BLOCK_C=block_c,
        )  # fmt: skip
    return Statistics(mean, None, invstd)


def bn_apply(z, statistics: Statistics, *, gamma, beta, residuals, spec) -> torch.Tensor:
    """y; residuals (N, <= C, H, W) are added after the norm."""
    y = empty_channels_last(z.shape, z)
    c = z.shape[1]
    rows = z.numel() // c
    config = rows_config(rows, c)
    residuals = [_as_rows(residual) for residual in residuals]
    residuals += [(None, 0, 1)] * (2 - len(residuals))
    (res0, stride0, c0), (res1, stride1, c1) = [(t, s, t.shape[1] if t is not None else 1) for t, s, *_ in residuals]
    with device_guard(z):
        launch(
            _bn_apply_fwd_kernel, cdiv(rows, config.block_m) * cdiv(c, config.block_c),
            z, res0, res1, y, statistics.mean, statistics.invstd, gamma, beta,
            rows, stride0, stride1, float(spec.norm_scale),
            C=c, C_RES0=c0, C_RES1=c1, RELU=spec.relu,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return y


def bn_reduce(dy, z, y, *, mean, invstd, gamma, beta, spec) -> torch.Tensor:
    """[2, C] fp32: branch_scale * sum dy', branch_scale * sum dy' * xhat; y gives the ReLU's mask, or None: z does."""
    c = z.shape[1]
    rows = z.numel() // c
    config = rows_config(rows, c)
    splits = cdiv(rows, config.block_m * config.steps)
    dy, dy_stride = _as_rows(dy)
    partial = torch.empty((splits, 2, c), dtype=torch.float32, device=z.device)
    with device_guard(z):
        launch(
            _bn_reduce_bwd_kernel, splits * cdiv(c, config.block_c),
            dy, z, y, mean, invstd, gamma, beta, partial, rows, config.steps, dy_stride,
            C=c, RELU=spec.relu, BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    sums = torch.empty((2, c), dtype=torch.float32, device=z.device)
    sum_partials(partial, sums, scale=spec.norm_scale)
    return sums


def bn_apply_grad(dy, z, y, sums, *, count, mean, invstd, gamma, beta, spec, need_dz=True, need_dres=False):
    """(dz or None, dy' or None); `count` is the number of pixels behind the batch statistics, None in eval."""
    c = z.shape[1]
    rows = z.numel() // c
    config = rows_config(rows, c)
    dz = empty_channels_last(z.shape, z) if need_dz else None
    dres = empty_channels_last(z.shape, z) if need_dres else None
    dy, dy_stride = _as_rows(dy)
    with device_guard(z):
        launch(
            _bn_apply_bwd_kernel, cdiv(rows, config.block_m) * cdiv(c, config.block_c),
            dy, z, y, dz, dres, sums, mean, invstd, gamma, beta,
            rows, dy_stride, 0.0 if count is None else 1.0 / count,
            float(spec.norm_scale),
            C=c, RELU=spec.relu, BATCH_STATS=count is not None,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return dz, dres


def _as_rows(x) -> tuple[torch.Tensor, int]:
    """x and the distance between its pixels, where x (a channel slice, say) has evenly spaced ones; else of a copy."""
    n, c, h, w = x.shape
    pitch = x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c
    expected = (pitch * h * w, 1, pitch * w, pitch)
    even = all(size == 1 or s == e for size, s, e in zip(x.shape, x.stride(), expected, strict=True))
    if not even or pitch < c:
        x, pitch = x.contiguous(memory_format=torch.channels_last), c
    return x, pitch
