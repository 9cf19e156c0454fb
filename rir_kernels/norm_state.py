"""The fused operation with the state of a BatchNorm2d: its parameters, buffers, mode and momentum rule."""

import torch
from torch import nn

from . import functional


def conv_bn_act(bn: nn.BatchNorm2d, x, weight, *, spec, bias=None, residuals=(), impl="auto") -> torch.Tensor:
    """functional.conv_bn_act with what nn.BatchNorm2d.forward would use and update, counting the batch as it does.

    Everything is read from `bn` at this call. The batch is counted after the operation: where that raises, nothing
    has changed. `spec.eps` is the caller's to take from `bn`.
    """
    tracks = bn.training and bn.track_running_stats
    momentum = bn.momentum
    if momentum is None:  # cumulative average
        momentum = 1.0 / float(bn.num_batches_tracked + 1) if tracks and bn.num_batches_tracked is not None else 0.0
    uses_buffers = not bn.training or bn.track_running_stats
    y = functional.apply(
        x,
        weight,
        bn.weight,
        bn.bias,
        bn.running_mean if uses_buffers else None,
        bn.running_var if uses_buffers else None,
        bias=bias,
        residuals=residuals,
        spec=spec,
        training=bn.training or (bn.running_mean is None and bn.running_var is None),
        momentum=momentum,
        impl=impl,
    )
    if tracks and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    return y
