"""No convolution in front of the norm, behind the launcher's functions: z is x, and dx is dz.

Same signatures as `rir_kernels.triton.launch.conv`; weight is None. x is dense channels_last, and nothing joins it
before the norm.
"""

import torch

from rir_kernels.triton.launch.batchnorm import TileMoments, bn_apply, bn_running, bn_stats


def conv_train(x, weight, *, bias, residuals, spec) -> tuple[torch.Tensor, TileMoments]:
    """x itself and its statistics."""
    return x, bn_stats(x)


def conv_infer(x, weight, *, bias, residuals, spec, mean, var, gamma, beta, save_z):
    """(y, x itself) with given statistics."""
    statistics = bn_running(mean, var, spec.eps)
    return bn_apply(x, statistics, gamma=gamma, beta=beta, residuals=residuals, spec=spec), x


def conv_data_grad(dz, weight, *, shape, spec, upstream=None) -> tuple[torch.Tensor, None]:
    """dz itself; no sums of the layer upstream."""
    return dz, None
