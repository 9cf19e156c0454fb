"""The "torch" implementation: the packed operation in ATen ops, under torch's own autograd.

It runs anywhere, in every float dtype, and is differentiable any number of times; it is the default on a CPU.
"""

import torch
import torch.nn.functional as F

from ..common.activations import activate
from ..common.streams import add_to_first_channels


def conv_bn_act(
    x, weight, bn_weight, bn_bias, running_mean, running_var, *, bias, residuals, spec, training, momentum
) -> torch.Tensor:
    """Returns y; updates the running statistics in place when training. Without a weight z is x."""
    z = before_norm(x, weight, bias, residuals, spec)
    y = F.batch_norm(z, running_mean, running_var, bn_weight, bn_bias, training, momentum, spec.eps)
    return after_norm(y, residuals, spec)


def before_norm(x, weight, bias, residuals, spec) -> torch.Tensor:
    """Returns z, the input of the norm."""
    z = x
    if weight is not None:
        z = F.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    z = joined(z, residuals, spec)
    return add_to_first_channels(z, _shortcut(x, spec)) if spec.shortcut_channels else z


def _shortcut(x, spec):
    """spec.shortcut(x), with a gradient in x's memory format: a channel slice's gradient would be contiguous."""
    surplus = x.shape[1] - spec.shortcut_channels
    return spec.shortcut(F.pad(x, (0, 0, 0, 0, 0, -surplus)) if surplus else x)


def after_norm(y, residuals, spec) -> torch.Tensor:
    """Returns y, from the normalized z."""
    if spec.norm_scale != 1.0:
        y = y * spec.norm_scale
    for residual in residuals if spec.post_norm else ():
        y = add_to_first_channels(y, residual)
    return activate(y, spec.activation)


def joined(z, residuals, spec):
    """Applies to z what comes before the norm: its factor and the residuals."""
    if spec.conv_scale != 1.0:
        z = z * spec.conv_scale
    for residual in () if spec.post_norm else residuals:
        z = add_to_first_channels(z, residual)
    return z
