"""Runs the operation with the state of a BatchNorm2d: its parameters, buffers, mode and momentum rule."""

import torch
from torch import nn

from ..common.call import Call
from ..common.cuda_graphs import check_host_may_read
from . import operation


def norm_act(bn: nn.BatchNorm2d, x, *, spec, residuals=(), impl="auto", otherwise=None) -> torch.Tensor:
    """Runs functional.norm_act with the state that nn.BatchNorm2d.forward would use and update; see `conv_bn_act`."""
    return conv_bn_act(bn, x, None, spec=spec, residuals=residuals, impl=impl, otherwise=otherwise)


def conv_bn_act(
    bn: nn.BatchNorm2d, x, weight, *, spec, bias=None, residuals=(), impl="auto", torch_format=False, otherwise=None
) -> torch.Tensor:
    """Runs functional.conv_bn_act with the state that nn.BatchNorm2d.forward would use and update, counter included.

    All state is read from `bn` at this call. The batch is counted after the operation, so an error changes nothing.
    The caller takes `spec.eps` from `bn`. If `bn.active_group()` returns a group (SyncBatchNorm2d), the statistics are
    those of its ranks. torch_format, otherwise: as in `operation.apply`.
    """
    running_mean, running_var, batches, momentum = _tracked(bn)
    training = bn.training or (bn.running_mean is None and bn.running_var is None)
    call = Call(
        x, weight, bias, bn.weight, bn.bias, tuple(residuals), running_mean, running_var, batches, spec, training,
        momentum,
    )  # fmt: skip
    group = None if type(bn) is nn.BatchNorm2d else _active_group(bn)
    return operation.apply(call, impl, process_group=group, torch_format=torch_format, otherwise=otherwise)


def _tracked(bn):
    """Returns (running mean, running var, batch counter, momentum) for this call; unused tensors are None."""
    uses_buffers = not bn.training or bn.track_running_stats
    batches = bn.num_batches_tracked if bn.training and bn.track_running_stats else None
    momentum = bn.momentum
    if momentum is None:  # cumulative average
        momentum = 0.0
        if batches is not None:
            check_host_may_read("momentum=None")
            momentum = 1.0 / float(batches + 1)
    return bn.running_mean if uses_buffers else None, bn.running_var if uses_buffers else None, batches, momentum


def _active_group(bn):
    find = getattr(bn, "active_group", None)
    return None if find is None else find()
