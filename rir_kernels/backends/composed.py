"""Runners that compose torch's own operators, under torch's autograd: "torch" and "reference"."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..common.call import Call
from ..common.memory_format import to_format
from ..common.running_statistics import values
from ..reference import functional as reference
from . import aten


@dataclass(frozen=True)
class Composed:
    """impl: "torch" or "reference"; channels_last: y's format, or None: as torch's operators return it."""

    impl: str
    channels_last: bool | None

    def __call__(self, call: Call) -> torch.Tensor:
        # torch's norm requires its four tensors in one dtype, and saves the statistics for backward. It gets copies,
        # since the buffers may change in between (DDP rewrites them before each forward)
        wide = torch.promote_types(call.x.dtype, torch.float32)
        bn_weight, bn_bias = (None if p is None else p.to(wide) for p in (call.bn_weight, call.bn_bias))
        running = (call.running_mean, call.running_var)
        mean, var = (None if buffer is None else buffer.to(wide, copy=True) for buffer in running)
        compose: Callable = _reference if self.impl == "reference" else aten.conv_bn_act
        y = compose(
            call.x, call.weight, bn_weight, bn_bias, mean, var, bias=call.bias, residuals=call.residuals,
            spec=call.spec, training=call.training, momentum=call.momentum,
        )  # fmt: skip
        y = to_format(y, self.channels_last)  # first, so an out-of-memory error leaves the buffers untouched
        if call.training and mean is not None and var is not None:
            values(call.running_mean).copy_(mean.detach())
            values(call.running_var).copy_(var.detach())
        if call.num_batches_tracked is not None:
            call.num_batches_tracked.add_(1)
        return y


def _reference(x, weight, bn_weight, bn_bias, running_mean, running_var, *, bias, residuals, spec, training, momentum):
    if spec.shortcut_channels:
        residuals = (*residuals, spec.shortcut(x))
    return reference.conv_bn_act(
        x, weight, bn_weight=bn_weight, bn_bias=bn_bias, running_mean=running_mean, running_var=running_var, bias=bias,
        residual=residuals, residual_at="post_norm" if spec.post_norm else "pre_norm",
        branch_scale=spec.branch_scale, stride=spec.stride, padding=spec.padding, dilation=spec.dilation,
        groups=spec.groups, training=training, momentum=momentum, eps=spec.eps,
        activation=spec.activation,
    )  # fmt: skip
