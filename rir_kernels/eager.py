"""The short way of an eager call that is like one before: same shapes, same options, other addresses.

What a call is checked for, which implementation it gets and what that launches depend on its tensors' metadata alone.
So the first call of a kind takes the long way through `functional`, and leaves a plan; the ones after it find it by
their metadata. Only our own kernels ("triton") can be planned. Whatever watches or transforms operators
(torch.compile, torch.func, dispatch modes, torch.jit.trace) sees the registered op, by the long way.
"""

import importlib
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from . import dispatch, fused, ops
from .layout import as_channels_last, is_channels_last, to_format
from .spec import ConvBNActSpec

_PLAIN = frozenset({torch.Tensor, Parameter, type(None)})
_ALIGNMENT = 16  # bytes; kernels are compiled for addresses that are multiples of it
_KEPT = 4096  # kinds of calls


@dataclass(frozen=True, slots=True)
class _Planned:
    """What calls of one kind have in common."""

    plan: object
    spec: ConvBNActSpec
    training: bool
    save: bool  # for backward
    channels_last: bool  # the format of input and output
    written: bool  # the buffers


_planned: dict[tuple, _Planned | None] = {}


def kind_of(tensors, buffers, spec, training, momentum, impl) -> tuple | None:
    """What calls that can share a plan have in common, None where this one may have none.

    tensors: x, weight, bias, bn_weight, bn_bias and residuals, which are differentiated; buffers: running_mean,
    running_var, num_batches_tracked.
    """
    every = tensors + buffers
    if type(momentum) is not float or not {type(t) for t in every} <= _PLAIN or not dispatch.plainly_eager():
        return None
    try:
        metadata = [
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % _ALIGNMENT) for t in every
        ]
    except RuntimeError:  # a sparse tensor has no strides
        return None
    x = tensors[0]
    save = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
    tf32 = x.dtype == torch.float32 and dispatch.tf32_allowed()
    return (*metadata, spec, training, save, dispatch.meant_by(impl), tf32)


def repeat(kind, tensors, buffers, momentum) -> torch.Tensor | None:
    """y, by the plan of an earlier call of this kind; None where there is none."""
    planned = _planned.get(kind)
    if planned is None:
        return None
    if planned.written:
        torch.autograd.graph.increment_version([t for t in buffers if t is not None])
    if not planned.channels_last:
        tensors = _in_channels_last(tensors)
    if planned.save:
        y = ops.ConvBNActFunction.apply(
            planned.plan, buffers, momentum, planned.spec, planned.training, "triton", *tensors
        )
    else:
        (y,) = planned.plan(tensors + buffers, (momentum,))
    return y if planned.channels_last else to_format(y, False)


def prepare(kind, tensors, buffers, spec, training) -> None:
    """Leaves the plan for calls of this kind, where there can be one; this one has been checked."""
    if len(_planned) >= _KEPT:
        _planned.clear()
    _planned[kind] = None
    every = tensors + buffers
    if all(t is None or (t.data_ptr() % _ALIGNMENT == 0 and (t.dim() > 1 or t.is_contiguous())) for t in every):
        _planned[kind] = _plan(tensors, buffers, spec, training, save=kind[-3])


def _plan(tensors, buffers, spec, training, save):
    places, plans = (importlib.import_module(f"rir_kernels.triton.launch.{name}") for name in ("places", "plan"))

    def forward(x, weight, bias, gamma, beta, *others):
        *residuals, running_mean, running_var, batches = others
        y, z, mean, _, invstd = fused.forward(
            x, weight, bias, gamma, beta, running_mean, running_var, residuals, spec,
            training=training, save=save, impl="triton", momentum=places.Slot(0), batches=batches,
        )  # fmt: skip
        return (y, z, mean, invstd) if save else (y,)

    try:
        plan = plans.record(forward, _in_channels_last(tensors) + buffers)
    except places.Unplannable:
        return None
    written = training and any(t is not None for t in buffers)
    return _Planned(plan, spec, training, save, is_channels_last(tensors[0]), written)


def _in_channels_last(tensors):
    x, *parameters = tensors[:5]
    return (as_channels_last(x), *parameters, *map(as_channels_last, tensors[5:]))
