"""The launcher's functions without a convolution before the norm: z is x, and dx is dz.

The signatures are those of `rir_kernels.triton.launch.conv`; weight is None. x is dense channels_last, and nothing is
added to it before the norm.
"""

import torch

from rir_kernels.triton.launch.batchnorm import TileMoments, bn_apply, bn_running, bn_stats


def conv_train(x, weight, *, bias, residuals, spec) -> tuple[torch.Tensor, TileMoments]:
    """Returns x itself and its statistics."""
    return x, bn_stats(x)


def conv_infer(x, weight, *, bias, residuals, spec, mean, var, gamma, beta, save_z):
    """Returns (y, x itself) for given statistics."""
    statistics = bn_running(mean, var, spec.eps)
    return bn_apply(x, statistics, gamma=gamma, beta=beta, residuals=residuals, spec=spec), x


def conv_data_grad(dz, weight, *, shape, spec, upstream=None) -> tuple[torch.Tensor, None]:
    """Returns dz itself, and no sums for the upstream layer."""
    return dz, None
