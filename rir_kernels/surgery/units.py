"""What a generated forward calls: one chain as a fused operation, from the modules that it bypasses.

They are looked at in every call. Where one may not be bypassed, or the tensors do not fit the fused operation (a
residual that is broadcast, or of another dtype), the modules are called one by one, as they were before. The output's
memory format is that of the convolution's output: channels_last where x or the weight is.
"""

import functools

import torch
import torch.nn.functional as F

from .. import norm_state
from ..spec import ConvBNActSpec
from .guards import conv_obstacle, norm_has_relu, norm_obstacle, padding_of, pair, relu_obstacle


def conv_bn_act(x, conv, bn, act, *residuals, post_norm=True, scale=1.0, impl="auto"):
    """act(bn(scale * conv(x) + residuals)) or, post_norm, act(scale * bn(conv(x)) + residuals).

    act: a module, "relu" or None; bn may bring a ReLU of its own.
    """
    if not (conv_obstacle(conv) or norm_obstacle(bn) or _act_obstacle(act)):
        relu = act is not None or norm_has_relu(bn)
        spec = _spec(pair(conv.stride), padding_of(conv), bn.eps, relu, post_norm and len(residuals) > 0, scale)
        if _fits(x, residuals, conv, spec):
            parameters = conv._parameters
            return norm_state.conv_bn_act(
                bn, x, parameters["weight"], bias=parameters["bias"], residuals=residuals, spec=spec, impl=impl,
                torch_format=True,
            )  # fmt: skip
    y = conv(x)
    if post_norm:
        y = bn(y)
    if scale != 1.0:
        y = y * scale
    for residual in residuals:
        y = y + residual
    if not post_norm:
        y = bn(y)
    return _act(y, act)


def bn_act(x, bn, act, *, impl="auto"):
    """act(bn(x)), where one of them is or has a ReLU."""
    if type(x) is not torch.Tensor or x.dim() != 4 or norm_obstacle(bn) or _act_obstacle(act):
        return _act(bn(x), act)
    relu = act is not None or norm_has_relu(bn)
    return norm_state.norm_act(bn, x, spec=_spec((1, 1), (0, 0), bn.eps, relu), impl=impl)


def _act(y, act):
    return F.relu(y) if act == "relu" else y if act is None else act(y)


def _act_obstacle(act):
    return act is not None and act != "relu" and relu_obstacle(act)


def _spec(stride, padding, eps, relu, post_norm=False, scale=1.0):
    # the compiler looks through the cache, and warns of it
    make = ConvBNActSpec if torch.compiler.is_compiling() else _kept_spec
    return make(stride, padding, eps=eps, relu=relu, post_norm=post_norm, branch_scale=scale)


_kept_spec = functools.lru_cache(maxsize=1024)(ConvBNActSpec)


def _fits(x, residuals, conv, spec):
    if not all(type(t) is torch.Tensor and t.dim() == 4 for t in (x, *residuals)):
        return False
    if not residuals:
        return True
    shape = spec.output_shape(x, conv._parameters["weight"])
    alike = all(r.dtype == x.dtype for r in residuals) or torch.is_autocast_enabled(x.device.type)
    return alike and all(tuple(r.shape) == shape for r in residuals)
