"""The operation as registered ops, one per direction, for torch.compile and torch.export.

The ops are functional: they return the batch statistics, and the owner of the running ones updates them. Outputs that
were not requested are empty tensors of shape (0,). Everything is channels_last; no output aliases another or an input.
Without a weight there is no convolution and z is x, dense, with nothing added before the norm; the output z is empty.
"""

import dataclasses
from typing import Any

import torch

from ..backends import fused, plans
from ..common.memory_format import empty_channels_last
from ..common.spec import ConvBNActSpec

_TYPES: dict[Any, str] = {tuple[int, int]: "int[2]", int: "int", bool: "bool", float: "float"}
*_FIELDS, _ = dataclasses.fields(ConvBNActSpec)  # the last one is the activation, a pair or None
_SPEC = ", ".join(f"{_TYPES[field.type]} {field.name}" for field in _FIELDS)
_SPEC += ", str? activation, float? activation_parameter"
_library = torch.library.Library("rir_kernels", "DEF")
_library.define(
    "conv_bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, "
    f"Tensor? running_var, Tensor[] residuals, {_SPEC}, bool training, bool save, str impl) "
    "-> (Tensor y, Tensor z, Tensor mean, Tensor var, Tensor invstd)"
)
_library.define(
    "conv_bn_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor z, Tensor? y, Tensor mean, Tensor invstd, "
    f"Tensor? bn_weight, Tensor? bn_bias, {_SPEC}, bool training, bool[6] needs, str impl) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dbn_weight, Tensor dbn_bias, Tensor dresidual)"
)


def flat(spec: ConvBNActSpec):
    activation = (None, None) if spec.activation is None else spec.activation
    return (*[getattr(spec, field.name) for field in _FIELDS], *activation)


def _spec(values) -> ConvBNActSpec:
    *values, name, parameter = values
    fields = {field.name: value for field, value in zip(_FIELDS, _hashable(values), strict=True)}
    return ConvBNActSpec(**fields, activation=None if name is None else (name, parameter))


def _hashable(options):
    return tuple([tuple(option) if isinstance(option, list) else option for option in options])


def _or_empty(tensors, like):
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _forward(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residuals, *options):
    tensors = (x, weight, bias, bn_weight, bn_bias, running_mean, running_var, *residuals)
    return _or_empty(plans.run(_launch_forward, _hashable(options), tensors), x)


def _launch_forward(options, _, x, weight, bias, bn_weight, bn_bias, running_mean, running_var, *residuals):
    *spec, training, save, impl = options
    return fused.forward(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residuals, _spec(spec),
        training=training, save=save, impl=impl,
    )  # fmt: skip


def _forward_fake(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residuals, *rest):
    *spec, training, save, _impl = rest
    shape = _spec(spec).output_shape(x, weight)
    y = empty_channels_last(shape, x)
    keep = training or save
    statistics = [x.new_empty(shape[1], dtype=torch.float32) if keep else x.new_empty(0) for _ in range(3)]
    if not training:
        statistics[1] = x.new_empty(0)
    return y, torch.empty_like(y) if keep and weight is not None else x.new_empty(0), *statistics


def _backward(dy, x, weight, z, y, mean, invstd, bn_weight, bn_bias, *options):
    tensors = (dy, x, weight, z, y, mean, invstd, bn_weight, bn_bias)
    return _or_empty(plans.run(_launch_backward, _hashable(options), tensors), x)


def _launch_backward(options, _, dy, x, weight, z, y, mean, invstd, bn_weight, bn_bias):
    *spec, training, needs, impl = options
    return fused.backward(
        dy, x, weight, z, y, mean, invstd, bn_weight, bn_bias, _spec(spec), training=training, needs=needs, impl=impl
    )


def _backward_fake(dy, x, weight, z, y, mean, invstd, bn_weight, bn_bias, *rest):
    needs = rest[-2]
    channels = mean.shape
    shapes = (x.shape, None if weight is None else weight.shape, channels, channels, channels, z.shape)
    return tuple(
        x.new_empty(0) if not need else mean.new_empty(shape) if shape is channels else empty_channels_last(shape, x)
        for need, shape in zip(needs, shapes, strict=True)
    )


for _name, _implementation, _fake in (
    ("conv_bn_act", _forward, _forward_fake),
    ("conv_bn_act_backward", _backward, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rir_kernels::{_name}", _fake, lib=_library)
