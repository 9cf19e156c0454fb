"""The vendor's convolution (cuDNN, oneDNN) as the launcher's four functions: its half of the "hybrid" implementation.

The signatures are those of `rir_kernels.triton.launch.conv` and `.wgrad`; any kernel size, groups and dilation work.
The norm kernels stay ours.
"""

import torch
import torch.nn.functional as F
import torch.nn.grad

from rir_kernels.common.memory_format import dense_channels_last
from rir_kernels.triton.launch.batchnorm import TileMoments, bn_apply, bn_running, bn_stats


def conv_train(x, weight, *, bias, residuals, spec) -> tuple[torch.Tensor, TileMoments]:
    """Returns z and its statistics."""
    z = _conv(x, weight, bias, () if spec.post_norm else residuals, spec)
    return z, bn_stats(z)


def conv_infer(x, weight, *, bias, residuals, spec, mean, var, gamma, beta, save_z):
    """Returns (y, z or None) for given statistics."""
    z = _conv(x, weight, bias, () if spec.post_norm else residuals, spec)
    statistics = bn_running(mean, var, spec.eps)
    after = residuals if spec.post_norm else ()
    return bn_apply(z, statistics, gamma=gamma, beta=beta, residuals=after, spec=spec), z if save_z else None


def conv_data_grad(dz, weight, *, shape, spec, upstream=None) -> tuple[torch.Tensor, None]:
    """Returns dx of the given shape, and no sums for the upstream layer."""
    dx = torch.nn.grad.conv2d_input(shape, weight, dz, spec.stride, spec.padding, spec.dilation, spec.groups)
    dx = dense_channels_last(dx)
    if spec.conv_scale != 1.0:
        dx *= spec.conv_scale
    if spec.shortcut_channels:
        spec.shortcut(dx).add_(dz[:, : spec.shortcut_channels])
    return dx, None


def conv_weight_grad(dz, x, *, kernel, spec) -> torch.Tensor:
    """Returns dW (C_out, C_in/groups, kh, kw)."""
    shape = (dz.shape[1], x.shape[1] // spec.groups, *kernel)
    dw = torch.nn.grad.conv2d_weight(x, shape, dz, spec.stride, spec.padding, spec.dilation, spec.groups)
    dw = dense_channels_last(dw)
    return dw * spec.conv_scale if spec.conv_scale != 1.0 else dw


def _conv(x, weight, bias, residuals, spec) -> torch.Tensor:
    z = F.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    z = dense_channels_last(z)
    if spec.conv_scale != 1.0:
        z *= spec.conv_scale
    if spec.shortcut_channels:
        residuals = (*residuals, spec.shortcut(x))
    for residual in residuals:
        z[:, : residual.shape[1]] += residual
    return z
