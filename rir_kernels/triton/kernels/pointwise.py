"""Element-wise formulas that several kernels share; each stands here once.

    norm(z)  = (z - mean) * (invstd * gamma) + beta

The mean is subtracted first: `scale * z + shift` with a folded shift cancels catastrophically where |mean| >> std.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def pdl_wait(USE_PDL: tl.constexpr):
    """Waits for the previous launch; every kernel calls it first.

    With USE_PDL (programmatic dependent launch) the previous launch may still be running, and must have finished before
    this kernel touches memory. The next launch may start as soon as all programs of this one have called this.
    """
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def load_channels(ptr, channels, C, default):
    """Loads a per-channel fp32 vector; filled with `default` if the pointer is None (no affine parameters)."""
    if ptr is None:
        return tl.full(channels.shape, default, tl.float32)
    else:  # Triton compiles what follows a return, but not the branch that is not taken
        return tl.load(ptr + channels, mask=channels < C, other=default).to(tl.float32)


@triton.jit
def normalize(z, mean, invstd, gamma, beta):
    return (z - mean) * (invstd * gamma) + beta


@triton.jit
def merge_moments(count, mean, m2, count_b, mean_b, m2_b):
    """Merges two (count, mean, M2 = sum of squared deviations) as Chan et al. do; either side may be empty."""
    total = count + count_b
    weight = count_b / tl.maximum(total, 1.0)
    delta = mean_b - mean
    return total, mean + delta * weight, m2 + m2_b + delta * delta * (count * weight)


@triton.jit
def tile_moments(values, valid, count, AXIS: tl.constexpr):
    """Computes mean and M2 of the valid entries of a tile along AXIS; `count` is their number."""
    mean = tl.sum(tl.where(valid, values, 0.0), AXIS) / tl.maximum(count, 1.0)
    deviation = tl.where(valid, values - tl.expand_dims(mean, AXIS), 0.0)
    return mean, tl.sum(deviation * deviation, AXIS)
