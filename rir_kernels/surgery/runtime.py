"""The functions that a generated forward calls: they run one chain as a fused operation that bypasses its modules.

Every call checks the modules. If one may not be bypassed, or the tensors do not fit the fused operation (a residual
that is broadcast or has another dtype, channels that are not the weight's), the original operations run one by one, so
results, dtypes and errors are those of the modules. The output has the memory format of the convolution's output:
channels_last if x or the weight is.
"""

import functools

import torch

from ..common.activations import activate
from ..common.spec import kept_spec
from ..dispatch import bn_state
from .activations import activation_of
from .bypass import act_of_norm, activation_obstacle, conv_obstacle, norm_obstacle, padding_of, pair, tensor_of
from .fallback import note

_NO_IMAGE = "it was not given images, dense tensors of four dimensions"


def conv_bn_act(x, conv, bn, act, *residuals, post_norm=True, scale=1.0, impl="auto", acts=False, one_by_one=None):
    """Returns act(bn(scale * conv(x) + residuals)) or, post_norm, act(scale * bn(conv(x)) + residuals).

    act: a module, an activation as in `functional`, or None; bn may end with one. acts: whether there was a module, so
    that None means that it is gone. one_by_one: called as one_by_one(x, *residuals) if it cannot be one operation; None
    calls the modules as in the formula.
    """
    if one_by_one is None:
        one_by_one = functools.partial(_one_by_one, conv, bn, act, post_norm, scale)
    if reason := obstacle(bn, act, conv, acts=acts):
        return _instead(one_by_one, x, residuals, reason, asked=False)
    activation, weight = _activation(bn, act), tensor_of(conv, "weight")
    spec = _spec(pair(conv.stride), padding_of(conv), bn.eps, activation, post_norm and len(residuals) > 0, scale)
    if reason := _misfit(x, residuals, weight, spec):
        return _instead(one_by_one, x, residuals, reason)
    return bn_state.conv_bn_act(
        bn,
        x,
        weight,
        bias=tensor_of(conv, "bias"),
        residuals=residuals,
        spec=spec,
        impl=impl,
        torch_format=True,
        otherwise=functools.partial(_instead, one_by_one, x, residuals),
    )


def bn_act(x, bn, act, *, impl="auto", acts=False, one_by_one=None):
    """Returns act(bn(x)), where one of them is or has an activation; acts, one_by_one: as in `conv_bn_act`."""
    if one_by_one is None:
        one_by_one = functools.partial(_bn_act, bn, act)
    if not _is_image(x):
        return _instead(one_by_one, x, (), _NO_IMAGE)
    if reason := obstacle(bn, act, acts=acts):
        return _instead(one_by_one, x, (), reason, asked=False)
    otherwise, activation = functools.partial(_instead, one_by_one, x, ()), _activation(bn, act)
    return bn_state.norm_act(bn, x, spec=_spec((1, 1), (0, 0), bn.eps, activation), impl=impl, otherwise=otherwise)


def obstacle(bn, act, *conv, acts=False) -> str:
    """Returns why these modules, with or without a convolution first, cannot be one operation now, or ""."""
    for one in conv:
        if reason := conv_obstacle(one):
            return f"its convolution: {reason}"
    if reason := norm_obstacle(bn):
        return f"its norm: {reason}"
    if (acts if act is None else not isinstance(act, str | tuple)) and (reason := activation_obstacle(act)):
        return f"its activation: {reason}"
    return ""


def _instead(one_by_one, x, residuals, reason, asked=True):
    note(getattr(one_by_one, "__self__", None), (x,), reason, asked=asked)
    return one_by_one(x, *residuals)


def _one_by_one(conv, bn, act, post_norm, scale, x, *residuals):
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
    """Calls a child that is not bypassed."""
    return module(*args, **kwargs)


def attribute(module, name):
    """Returns a parameter or buffer."""
    return getattr(module, name)


def _act(y, act):
    return activate(y, activation_of(act)) if act is None or isinstance(act, str | tuple) else act(y)


def _activation(bn, act):
    return activation_of(act_of_norm(bn) if act is None else act)


def _spec(stride, padding, eps, activation, post_norm=False, scale=1.0):
    return kept_spec(stride, padding, eps=eps, activation=activation, post_norm=post_norm, branch_scale=scale)


def _is_image(x):
    return type(x) is torch.Tensor and x.dim() == 4 and x.layout is torch.strided


def _misfit(x, residuals, weight, spec):
    """Returns why these tensors do not fit one operation, or an empty string."""
    if weight is None:
        return "its convolution has no weight"
    if not all(map(_is_image, (x, *residuals))):
        return _NO_IMAGE
    if not residuals:
        return ""
    shape = spec.output_shape(x, weight)
    if not (all(r.dtype == x.dtype for r in residuals) or torch.is_autocast_enabled(x.device.type)):
        return "what is added has another dtype"
    return "" if all(tuple(r.shape) == shape for r in residuals) else "what is added has another shape"
