"""The short way of an eager call that is like one before: same shapes, same options, other addresses.

What a call is checked for, which implementation it gets and what that launches depend on its tensors' metadata alone.
So the first call of a kind takes the long way through `functional`, and leaves a plan; the ones after it find it by
their metadata. Only our own kernels ("triton") can be planned. Whatever watches or transforms operators
(torch.compile, torch.func, dispatch modes, torch.jit.trace) sees the registered op, which has plans too (`plans`).
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..autograd import ops
from ..backends import fused, plans
from ..common.memory_format import in_channels_last, is_channels_last
from ..common.spec import ConvBNActSpec
from . import calls
from .choose import on_gpu
from .preference import meant_by


@dataclass(frozen=True, slots=True)
class Planned:
    """What calls of one kind have in common."""

    plan: Callable
    spec: ConvBNActSpec
    training: bool
    save: bool  # for backward
    copied: torch.Size | None  # the output's shape where it is copied to contiguous
    in_place: bool  # whether the kernels can read the tensors where they are
    written: bool  # the buffers
    _backward: dict[tuple, Callable | None] = field(default_factory=dict)

    def gradients(self, tensors, needs, sums=None, upstream=None) -> tuple | None:
        """The gradients of such a call, by a plan of their own; None where there can be none.

        tensors: dy, x, weight, z, y, mean, invstd, bn_weight, bn_bias, as the registered op has them. sums: those of
        the norm's backward, where they are known. upstream: z, mean, invstd, weight, bias and ReLU of the norm whose
        output x is: its sums follow the six gradients, or None twice where they were not computed.
        """
        *norm, relu = upstream or (None,) * 6
        every = (*tensors, *(sums or (None, None)), *norm)
        metadata = plans.metadata(every)
        if metadata is None:
            return None
        kind = (*metadata, *needs, relu)
        if kind not in self._backward:
            backward = functools.partial(self._gradients, needs, upstream is not None, relu)
            self._backward[kind] = plans.record(backward, every)
        plan = self._backward[kind]
        if plan is None:
            return None
        dx, dweight, dbias, dgamma, dbeta, *rest = plan(every)
        if sums is not None:  # which a plan does not hand out: they were handed in
            dbeta, dgamma = sums
        return dx, dweight, dbias, dgamma, dbeta, *rest

    def _gradients(self, needs, has_upstream, relu, *tensors):
        norm = importlib.import_module("rir_kernels.triton.launch.batchnorm")
        sums, upstream = tensors[9:11], norm.Upstream(*tensors[11:], relu) if has_upstream else None
        given = sums[0] is not None
        if given:
            needs = [*needs[:3], False, False, needs[5]]
        gradients = fused.backward(  # type: ignore[misc] # mypy takes a star for all that may follow
            *tensors[:9], self.spec, training=self.training, needs=needs, impl="triton",
            upstream=upstream, sums=sums if given else None,
        )  # fmt: skip
        return (*gradients[:6], *(gradients[6] or (None, None))) if has_upstream else gradients


_planned = plans.Kinds()  # kind: Planned, or None where there can be no plan


def kind_of(tensors, buffers, spec, training, momentum, impl, torch_format) -> tuple | None:
    """What calls that can share a plan have in common, None where this one may have none.

    tensors: x, weight, bias, bn_weight, bn_bias and residuals, which are differentiated; buffers: running_mean,
    running_var, num_batches_tracked; torch_format: whose rule the output's memory format follows.
    """
    impl = meant_by(impl)
    # "auto" never means our kernels off the GPU: nothing to look up there
    may_launch = impl == "triton" or (impl == "auto" and isinstance(tensors[0], torch.Tensor) and on_gpu(tensors[0]))
    metadata = plans.metadata(tensors + buffers) if may_launch and type(momentum) is float else None
    # torch counts batches wherever the counter lies, a kernel on its own device alone
    if metadata is None or (buffers[2] is not None and buffers[2].device != tensors[0].device):
        return None
    save = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
    return (*metadata, spec, training, torch_format, save, impl)


def repeat(kind, tensors, buffers, momentum) -> torch.Tensor | None:
    """y, by the plan of an earlier call of this kind; None where there is none."""
    planned = _planned.get(kind)
    if planned is None:
        return None
    if calls.on():
        options = {"asked": "triton", "meant": "triton", "impl": "triton"}
        calls.ran(tensors[0], tensors[1], planned.spec, planned.training, **options)
    if planned.written and buffers[2] is not None:  # of the statistics torch leaves the version as it is
        torch.autograd.graph.increment_version([buffers[2]])
    if not planned.in_place:
        tensors = in_channels_last(tensors)
    # before the buffers are updated: where memory ends, nothing has changed
    copy = None
    if planned.copied:
        copy = torch.empty(planned.copied, dtype=tensors[0].dtype, device=tensors[0].device)
    if planned.save:
        _, y = ops.ConvBNActFunction.apply(
            planned, buffers, momentum, planned.spec, planned.training, "triton", *tensors
        )
    else:
        (y,) = planned.plan(tensors + buffers, (momentum,))
    return y if copy is None else copy.copy_(y)


def prepare(kind, tensors, buffers, spec, training, channels_last) -> None:
    """Leaves the plan for calls of this kind, or that there can be none; this one has been checked.

    channels_last: the output's format, of which a kind has one.
    """
    if kind not in _planned:
        _planned.remember(kind, _plan(tensors, buffers, spec, training, channels_last, save=kind[-2]))


def _plan(tensors, buffers, spec, training, channels_last, save):
    momentum = importlib.import_module("rir_kernels.triton.plan.places").Slot(0)
    copied = None

    def forward(x, weight, bias, gamma, beta, *others):
        nonlocal copied
        *residuals, running_mean, running_var, batches = others
        y, z, mean, _, invstd = fused.forward(
            x, weight, bias, gamma, beta, running_mean, running_var, residuals, spec,
            training=training, save=save, impl="triton", momentum=momentum, batches=batches,
        )  # fmt: skip
        copied = None if channels_last or not is_channels_last(y) else y.shape
        return (y, z, mean, invstd) if save else (y,)

    read = in_channels_last(tensors)
    plan = plans.record(forward, read + buffers)
    in_place = all(a is b for a, b in zip(tensors, read, strict=True))
    written = training and any(t is not None for t in buffers)
    return plan and Planned(plan, spec, training, save, copied, in_place, written)
