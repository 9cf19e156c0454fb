"""Launches the normalization kernels. Activations are (N, C, H, W) in dense channels_last, read as rows [N*H*W, C]."""

from dataclasses import InitVar, dataclass

import torch

from rir_kernels.common.activations import RELU, Activation
from rir_kernels.common.memory_format import empty_channels_last
from rir_kernels.triton.kernels.batchnorm import (
    _bn_apply_bwd_kernel,
    _bn_apply_fwd_kernel,
    _bn_finalize_fwd_kernel,
    _bn_reduce_bwd_kernel,
    _bn_running_fwd_kernel,
    _bn_stats_fwd_kernel,
    _bn_sum_bwd_kernel,
)
from rir_kernels.triton.launch.runtime import aligned_channels, device_guard, launch
from rir_kernels.triton.tiling.conv_cost import cdiv
from rir_kernels.triton.tiling.conv_tiles import rows_config

# Few programs, bound by memory latency: load as many at a time as fit in registers. Independent of their total number,
# so that one kernel serves every batch size.
FINALIZE_TILES, SUM_SPLITS = 1024, 512


@dataclass(frozen=True)
class TileMoments:
    """Holds the statistics of disjoint tiles: mean and M2 [tiles, C], count [tiles], all fp32."""

    mean: torch.Tensor
    m2: torch.Tensor
    count: torch.Tensor

    @classmethod
    def empty(cls, tiles: int, channels: int, device) -> "TileMoments":
        # separate buffers, so that each address is aligned for any number of tiles
        mean, m2 = (torch.empty((tiles, channels), dtype=torch.float32, device=device) for _ in range(2))
        return cls(mean, m2, torch.empty(tiles, dtype=torch.float32, device=device))


@dataclass(frozen=True)
class Shared:
    """Layout of what the ranks of a group exchange, rows of `width` fp32 numbers: [mean | M2 | count], [sum | sum].

    The parts of a row start at multiples of 16 bytes, which the compiled kernels assume.
    """

    channels: int

    @property
    def pitch(self) -> int:
        return aligned_channels(self.channels, 4)

    @property
    def width(self) -> int:
        return 2 * self.pitch + aligned_channels(1, 4)

    def moments(self, rows: torch.Tensor) -> TileMoments:
        """Returns the moments in the ranks' consecutive rows as views, one tile per rank."""
        rows = rows.view(-1, self.width)
        means, m2s = (rows[:, first : first + self.channels] for first in (0, self.pitch))
        return TileMoments(means, m2s, rows[:, 2 * self.pitch])

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns both sums in the ranks' rows as a view [ranks, 2, C]."""
        return rows.view(-1, 2, self.pitch)[..., : self.channels]


@dataclass(frozen=True)
class Statistics:
    """Holds mean, biased var (None: not kept) and 1/sqrt(var + eps) per channel, fp32."""

    mean: torch.Tensor
    var: torch.Tensor | None
    invstd: torch.Tensor


@dataclass(frozen=True)
class Upstream:
    """The layer whose output is this layer's only input: y = act(norm(z)), with nothing added after the norm.

    So the gradient of this layer's input is that layer's dy, and z gives its pre-activation.
    """

    z: torch.Tensor
    mean: torch.Tensor
    invstd: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    activation: Activation | None = None
    relu: InitVar[bool] = False  # the same as activation=RELU

    def __post_init__(self, relu):
        if relu:
            object.__setattr__(self, "activation", RELU)


def bn_stats(z) -> TileMoments:
    """Computes the statistics of a tensor that none of our kernels wrote."""
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
    moments: TileMoments, eps: float, *, running_mean=None, running_var=None, batches=None, momentum=0.0, count=None
) -> Statistics:
    """Merges the tiles in order; updates the running statistics and the count of batches if given.

    count: [1] fp32 output for the number of pixels, or None.
    """
    c, device = moments.mean.shape[1], moments.mean.device
    # three buffers, not slices of one: an op's outputs must not alias
    mean, var, invstd = (torch.empty(c, dtype=torch.float32, device=device) for _ in range(3))
    _finalize(moments, eps, mean, var, invstd, count, running_mean, running_var, batches, momentum)
    return Statistics(mean, var, invstd)


def bn_share(moments: TileMoments) -> torch.Tensor:
    """Merges the tiles in order into a row of `Shared`."""
    shared = Shared(moments.mean.shape[1])
    row = torch.empty(shared.width, dtype=torch.float32, device=moments.mean.device)
    merged = shared.moments(row)
    _finalize(moments, 0.0, merged.mean, merged.m2, None, merged.count)
    return row


def _finalize(
    moments, eps, mean, var, invstd, count, running_mean=None, running_var=None, batches=None, momentum=0.0
):  # fmt: skip
    tiles, c = moments.mean.shape
    block_c = 8
    with device_guard(mean):
        launch(
            _bn_finalize_fwd_kernel, cdiv(c, block_c),
            moments.mean, moments.m2, moments.count, mean, var, invstd, count, running_mean, running_var, batches,
            tiles, float(eps), momentum,
            C=c, STRIDE=moments.mean.stride(0), COUNT_STRIDE=moments.count.stride(0),
            BLOCK_T=FINALIZE_TILES, BLOCK_C=block_c, num_warps=8,
        )  # fmt: skip


def bn_running(running_mean, running_var, eps: float) -> Statistics:
    """Copies the current running statistics: the buffers may change before backward runs."""
    c = running_mean.numel()
    mean, invstd = (torch.empty(c, dtype=torch.float32, device=running_mean.device) for _ in range(2))
    block_c = 256
    with device_guard(mean):
        launch(
            _bn_running_fwd_kernel, cdiv(c, block_c), running_mean, running_var, mean, invstd, float(eps),
            C=c, BLOCK_C=block_c,
        )  # fmt: skip
    return Statistics(mean, None, invstd)


def bn_apply(z, statistics: Statistics, *, gamma, beta, residuals, spec, out=None) -> torch.Tensor:
    """Returns y, written to `out` if given; adds residuals (N, <= C, H, W) after the norm."""
    y = empty_channels_last(z.shape, z) if out is None else out
    c = z.shape[1]
    rows = z.numel() // c
    config = rows_config(rows, c)
    residuals = [*map(evenly_spaced, residuals), None, None][:2]
    (stride0, c0), (stride1, c1) = [(0, 1) if t is None else (_pitch(t), t.shape[1]) for t in residuals]
    with device_guard(z):
        launch(
            _bn_apply_fwd_kernel, cdiv(rows, config.block_m) * cdiv(c, config.block_c),
            z, *residuals, y, statistics.mean, statistics.invstd, gamma, beta,
            rows, stride0, stride1, float(spec.norm_scale),
            C=c, C_RES0=c0, C_RES1=c1, ACT=spec.activation,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return y


def bn_reduce(dy, z, y, *, mean, invstd, gamma, beta, spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (dbeta, dgamma), fp32: branch_scale * sum dy', branch_scale * sum dy' * xhat.

    dy has evenly spaced pixels (`evenly_spaced`). y has the sign of the pre-activation; if y is None, z gives it.
    """
    return bn_sum(_reduced(dy, z, y, mean, invstd, gamma, beta, spec), spec.norm_scale)


def bn_share_sums(dy, z, y, *, mean, invstd, gamma, beta, spec) -> torch.Tensor:
    """Computes the sums of `bn_reduce` into a row of `Shared`."""
    shared = Shared(z.shape[1])
    row = torch.empty(2 * shared.pitch, dtype=torch.float32, device=z.device)
    _sum(_reduced(dy, z, y, mean, invstd, gamma, beta, spec), spec.norm_scale, None, *shared.sums(row)[0])
    return row


def _reduced(dy, z, y, mean, invstd, gamma, beta, spec):
    """Returns the partial sums [splits, 2, C]."""
    c = z.shape[1]
    rows = z.numel() // c
    config = rows_config(rows, c)
    splits = cdiv(rows, config.block_m * config.steps)
    partial = torch.empty((splits, 2, c), dtype=torch.float32, device=z.device)
    with device_guard(z):
        launch(
            _bn_reduce_bwd_kernel, splits * cdiv(c, config.block_c),
            dy, z, y, mean, invstd, gamma, beta, partial, rows, config.steps, _pitch(dy),
            C=c, ACT=spec.activation, BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return partial


def bn_sum(partial, scale: float, count=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (dbeta, dgamma), fp32: `scale` times the sums over partial [splits, 2, C], in a fixed order.

    count: [1] fp32 divisor, or None.
    """
    c = partial.shape[2]
    dbeta, dgamma = (torch.empty(c, dtype=torch.float32, device=partial.device) for _ in range(2))
    _sum(partial, scale, count, dbeta, dgamma)
    return dbeta, dgamma


def _sum(partial, scale, count, dbeta, dgamma):
    splits, _, c = partial.shape
    block_c = 8
    with device_guard(partial):
        launch(
            _bn_sum_bwd_kernel, 2 * cdiv(c, block_c), partial, dbeta, dgamma, count, splits, float(scale),
            C=c, STRIDE=partial.stride(1), BLOCK_S=SUM_SPLITS, BLOCK_C=block_c,
        )  # fmt: skip


def bn_apply_grad(dy, z, y, sums, *, count, mean, invstd, gamma, beta, spec, need_dz=True, need_dres=False):
    """Returns (dz or None, dy' or None); `count` is the number of pixels in the batch statistics, None in eval.

    sums: the result of `bn_reduce`, used only with batch statistics.
    """
    c = z.shape[1]
    rows = z.numel() // c
    config = rows_config(rows, c)
    dz = empty_channels_last(z.shape, z) if need_dz else None
    dres = empty_channels_last(z.shape, z) if need_dres else None
    dbeta, dgamma = (None, None) if sums is None else sums
    with device_guard(z):
        launch(
            _bn_apply_bwd_kernel, cdiv(rows, config.block_m) * cdiv(c, config.block_c),
            dy, z, y, dz, dres, dbeta, dgamma, mean, invstd, gamma, beta,
            rows, _pitch(dy), 0.0 if count is None else 1.0 / count,
            float(spec.norm_scale),
            C=c, ACT=spec.activation, BATCH_STATS=count is not None,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return dz, dres


def evenly_spaced(x) -> torch.Tensor:
    """Returns x if its pixels are evenly spaced, as in a channel slice, else a channels_last copy."""
    pitch, (_, c, h, w) = _pitch(x), x.shape
    expected = (pitch * h * w, 1, pitch * w, pitch)
    even = all(size == 1 or s == e for size, s, e in zip(x.shape, x.stride(), expected, strict=True))
    return x if even and pitch >= c else empty_channels_last(x.shape, x).copy_(x)


def _pitch(x) -> int:
    """Returns the stride between neighbouring pixels."""
    n, c, h, w = x.shape
    return x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c
