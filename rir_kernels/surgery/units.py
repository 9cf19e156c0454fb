"""What a generated forward calls: one chain as a fused operation, from the modules that it bypasses.

They are looked at in every call. Where one may not be bypassed, or the tensors do not fit the fused operation (a
residual that is broadcast, or of another dtype, channels that are not the weight's), what forward did is done one by
one: so results, dtypes and errors are those of the modules. The output's memory format is that of the convolution's
output: channels_last where x or the weight is.
"""

import functools

import torch
import torch.nn.functional as F

from .. import norm_state
from ..spec import ConvBNActSpec
from .guards import conv_obstacle, norm_has_relu, norm_obstacle, padding_of, pair, relu_obstacle, tensor_of


def conv_bn_act(x, conv, bn, act, *residuals, post_norm=True, scale=1.0, impl="auto", one_by_one=None):
    """act(bn(scale * conv(x) + residuals)) or, post_norm, act(scale * bn(conv(x)) + residuals).

    act: a module, "relu" or None; bn may bring a ReLU of its own. one_by_one: called as one_by_one(x, *residuals) where
    it cannot be one operation; None calls the modules as the formula has it.
    """
    if one_by_one is None:
        otherwise = functools.partial(_one_by_one, x, conv, bn, act, residuals, post_norm, scale)
    else:
        otherwise = functools.partial(one_by_one, x, *residuals)
    if conv_obstacle(conv) or norm_obstacle(bn) or _act_obstacle(act):
        return otherwise()
    relu, weight = act is not None or norm_has_relu(bn), tensor_of(conv, "weight")
    spec = _spec(pair(conv.stride), padding_of(conv), bn.eps, relu, post_norm and len(residuals) > 0, scale)
    if not _fits(x, residuals, weight, spec):
        return otherwise()
    return norm_state.conv_bn_act(
        bn,
        x,
        weight,
        bias=tensor_of(conv, "bias"),
        residuals=residuals,
        spec=spec,
        impl=impl,
        torch_format=True,
        otherwise=otherwise,
    )


def bn_act(x, bn, act, *, impl="auto", one_by_one=None):
    """act(bn(x)), where one of them is or has a ReLU; one_by_one: as in `conv_bn_act`."""
    otherwise = functools.partial(_bn_act, bn, act, x) if one_by_one is None else functools.partial(one_by_one, x)
    if not _is_image(x) or norm_obstacle(bn) or _act_obstacle(act):
        return otherwise()
    relu = act is not None or norm_has_relu(bn)
    return norm_state.norm_act(bn, x, spec=_spec((1, 1), (0, 0), bn.eps, relu), impl=impl, otherwise=otherwise)


def _one_by_one(x, conv, bn, act, residuals, post_norm, scale):
    y = conv(x)
    if post_norm:
        y = bn(y)
    if scale != 1.0:
        y = y * scale
    for residual in residuals:
        y = y + residual
    return _act(y, act) if post_norm else _bn_act(bn, act, y)


def _bn_act(bn, act, x):
    return _act(bn(x), act)


def call(module, /, *args, **kwargs):
    """A child that is not bypassed."""
    return module(*args, **kwargs)


def attribute(module, name):
    """A parameter or buffer."""
    return getattr(module, name)


def _act(y, act):
    return F.relu(y) if act == "relu" else y if act is None else act(y)


def _act_obstacle(act):
    return act is not None and act != "relu" and relu_obstacle(act)


def _spec(stride, padding, eps, relu, post_norm=False, scale=1.0):
    # the compiler looks through the cache, and warns of it
    make = ConvBNActSpec if torch.compiler.is_compiling() else _kept_spec
    return make(stride, padding, eps=eps, relu=relu, post_norm=post_norm, branch_scale=scale)


_kept_spec = functools.lru_cache(maxsize=1024)(ConvBNActSpec)


def _is_image(x):
    return type(x) is torch.Tensor and x.dim() == 4 and x.layout is torch.strided


def _fits(x, residuals, weight, spec):
    if weight is None or not all(map(_is_image, (x, *residuals))):
        return False
    if not residuals:
        return True
    shape = spec.output_shape(x, weight)
    alike = all(r.dtype == x.dtype for r in residuals) or torch.is_autocast_enabled(x.device.type)
    return alike and all(tuple(r.shape) == shape for r in residuals)
