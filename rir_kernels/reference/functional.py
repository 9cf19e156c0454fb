"""conv_bn_act in plain PyTorch: every step its own line, out of place.

    z = conv(x, W) + bias          "pre_norm":   z = branch_scale * z + [residual | 0]
    y = BN(z)                      "post_norm":  y = branch_scale * y + [residual | 0]
    y = act(y)

The residual joins before or after the norm: two different functions in training, where the norm sees the sum or not.
"""

import torch
import torch.nn.functional as F

from ..common.activations import activate, normal_form
from ..common.arguments import RESIDUAL_AT, check_choice, named_from, unplaced
from ..common.streams import add_to_first_channels


@named_from(2)
def conv_bn_act(
    x,
    weight,
    *,
    bn_weight=None,
    bn_bias=None,
    running_mean=None,
    running_var=None,
    bias=None,
    residual=None,
    residual_at=None,
    branch_scale=1.0,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    training=False,
    momentum=0.1,
    eps=1e-5,
    activation="relu",
):
    """Convolution, batch norm and activation, with a residual joining before or after the norm.

    x (N, C_in, H, W); weight (C_out, C_in / groups, kh, kw); bias (C_out,), added to the convolution's output;
    bn_weight, bn_bias, running_mean, running_var (C_out,). stride, padding, dilation: int or pair. residual: a tensor
    (N, C_res, H_out, W_out) with C_res <= C_out, or a tuple of two such, each added to the first C_res channels.
    Returns y (N, C_out, H_out, W_out). weight None: no convolution, the rest is done to x itself.

    x, weight, bias and residual share one float dtype (under autocast they may differ); the norm's tensors may be fp32
    beside half activations. `branch_scale` multiplies every channel of what a residual would be added to, whether one
    is given or not. In training the running statistics are updated in place, as torch.nn.functional.batch_norm does.

    TypeError for the dtypes and for a residual or a branch_scale without residual_at, ValueError for an unknown
    `residual_at` or `activation` and for a residual of another shape; what else torch's own functions refuse, they
    raise.
    """
    residuals = as_tuple(residual)
    check_dtypes(x, weight, bias, *residuals)
    if residual_at is not None:
        check_choice("residual_at", residual_at, RESIDUAL_AT)
    elif residuals or branch_scale != 1.0:
        raise unplaced(residuals)
    activation = normal_form(activation)

    z = x
    if weight is not None:
        z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if bias is not None:
        z = z + bias[:, None, None]
    return norm_act(
        z,
        lambda z: F.batch_norm(z, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps),
        residuals,
        residual_at,
        branch_scale,
        activation,
    )


def norm_act(z, norm, residual=None, residual_at="pre_norm", branch_scale=1.0, activation="relu"):
    """What follows the convolution: z (N, C, H, W) -> y of the same shape; `norm` is what normalizes, a function."""
    y = z
    if residual_at == "pre_norm":
        y = _join(branch_scale * y, residual)
    y = norm(y)
    if residual_at == "post_norm":
        y = _join(branch_scale * y, residual)
    return activate(y, normal_form(activation))


def check_dtypes(*tensors):
    """TypeError unless the tensors (None is skipped) are floating and share a dtype; autocast brings its own casts."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors))
    if any(not dtype.is_floating_point for dtype in dtypes):
        raise TypeError(f"x, weight, bias and residual must be floating, got {dtypes}: cast them with .to(dtype)")
    if len(dtypes) > 1 and not torch.is_autocast_enabled(tensors[0].device.type):
        raise TypeError(f"x, weight, bias and residual must share a dtype, got {dtypes}: cast them with .to(dtype)")


def _join(y, residual):
    for addend in as_tuple(residual):
        y = add_to_first_channels(y, addend)
    return y


def as_tuple(residual):
    """None, a tensor or a tuple of tensors -> a tuple of tensors."""
    if residual is None:
        return ()
    return (residual,) if isinstance(residual, torch.Tensor) else tuple(residual)
