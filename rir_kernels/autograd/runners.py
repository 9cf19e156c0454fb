"""Runners that launch our kernels: the registered op, and a recorded plan."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..backends import fused, plans
from ..common.call import Call
from ..common.memory_format import is_channels_last, to_format
from ..common.running_statistics import update_running
from ..common.spec import ConvBNActSpec
from . import registered_op
from .function import Backward, ConvBNActFunction


@dataclass(frozen=True)
class RegisteredOp:
    """Runs the ops that torch.compile sees. impl: "triton" or "hybrid"; channels_last: y's format."""

    impl: str
    channels_last: bool
    chains: ClassVar[bool] = False

    def __call__(self, call: Call) -> torch.Tensor:
        call = call.in_channels_last().with_dense_vectors()
        if call.needs_grad():
            _, y, mean, var = ConvBNActFunction.apply(self, call.without_inputs(), *call.inputs())
        else:
            y, _, _, _, mean, var = self.forward(call, save=False)
        y = to_format(y, self.channels_last)  # first, so an out-of-memory error leaves the buffers untouched
        if call.training and call.running_mean is not None:
            pixels = y.shape[0] * y.shape[2] * y.shape[3]
            update_running(call.running_mean, call.running_var, mean, var, call.momentum, pixels)
        if call.num_batches_tracked is not None:
            call.num_batches_tracked.add_(1)
        return y

    def forward(self, call: Call, save: bool = True) -> tuple[torch.Tensor, ...]:
        running: list[Any] = [call.running_mean, call.running_var]
        running = [None, None] if call.training else [buffer.contiguous() for buffer in running]
        y, z, mean, var, invstd = torch.ops.rir_kernels.conv_bn_act(
            call.x, call.weight, call.bias, call.bn_weight, call.bn_bias, *running, list(call.residuals),
            *registered_op.flat(call.spec), call.training, save, self.impl,
        )  # fmt: skip
        return y, z, mean, invstd, mean, var

    def backward(self, tensors: Backward, needs, spec, training, sums=None, upstream=None):
        flat = registered_op.flat(spec)
        return torch.ops.rir_kernels.conv_bn_act_backward(*tensors, *flat, training, needs, self.impl)


@dataclass(frozen=True, slots=True)
class Planned:
    """Replays a recorded plan, for calls with one signature."""

    plan: Callable
    spec: ConvBNActSpec
    training: bool
    saves: bool  # for backward
    copied: torch.Size | None  # the output's shape if it is copied to contiguous
    in_place: bool  # whether the kernels can read the tensors where they are
    writes: bool  # to the buffers
    _backward: dict[tuple, Callable | None] = field(default_factory=dict)
    impl: ClassVar[str] = "triton"
    chains: ClassVar[bool] = True

    def __call__(self, call: Call) -> torch.Tensor:
        if self.writes and call.num_batches_tracked is not None:  # torch does not bump the version of the statistics
            torch.autograd.graph.increment_version([call.num_batches_tracked])
        if not self.in_place:
            call = call.in_channels_last()
        copy = None  # first, so an out-of-memory error leaves the buffers untouched
        if self.copied:
            copy = torch.empty(self.copied, dtype=call.x.dtype, device=call.x.device)
        if self.saves:
            _, y = ConvBNActFunction.apply(self, call, *call.inputs())
        else:
            (y,) = self.forward(call)
        return y if copy is None else copy.copy_(y)

    def forward(self, call: Call) -> tuple:
        return self.plan(call.inputs() + call.buffers(), (call.momentum,))

    def backward(self, tensors: Backward, needs, spec, training, sums=None, upstream=None):
        """Replays a plan too, or calls the registered op if no plan is possible."""
        *norm, activation = upstream or (None,) * 6
        every = (*tensors, *(sums or (None, None)), *norm)
        metadata = plans.metadata(every)
        signature = None if metadata is None else (*metadata, *needs, activation)
        if signature is not None and signature not in self._backward:
            function = functools.partial(self._gradients, needs, upstream is not None, activation)
            self._backward[signature] = plans.record(function, every)
        plan = None if signature is None else self._backward[signature]
        if plan is None:
            return RegisteredOp(self.impl, True).backward(tensors, needs, spec, training)
        dx, dweight, dbias, dgamma, dbeta, *rest = plan(every)
        if sums is not None:  # a plan does not return its inputs
            dbeta, dgamma = sums
        return dx, dweight, dbias, dgamma, dbeta, *rest

    def _gradients(self, needs, has_upstream, activation, *tensors):
        norm = importlib.import_module("rir_kernels.triton.launch.batchnorm")
        sums, upstream = tensors[9:11], norm.Upstream(*tensors[11:], activation) if has_upstream else None
        given = sums[0] is not None
        if given:
            needs = [*needs[:3], False, False, needs[5]]
        gradients = fused.backward(  # type: ignore[misc] # mypy takes a star for all that may follow
            *tensors[:9], self.spec, training=self.training, needs=needs, impl="triton",
            upstream=upstream, sums=sums if given else None,
        )  # fmt: skip
        return (*gradients[:6], *(gradients[6] or (None, None))) if has_upstream else gradients


def planned(call: Call, saves: bool, channels_last: bool) -> Planned | None:
    """Records the plan of calls like this one; None if no plan is possible. channels_last: the format of y."""
    momentum = importlib.import_module("rir_kernels.triton.plan.places").Slot(0)
    copied = None

    def forward(x, weight, bias, gamma, beta, *others):
        nonlocal copied
        *residuals, running_mean, running_var, batches = others
        y, z, mean, _, invstd = fused.forward(
            x, weight, bias, gamma, beta, running_mean, running_var, residuals, call.spec,
            training=call.training, save=saves, impl="triton", momentum=momentum, batches=batches,
        )  # fmt: skip
        copied = None if channels_last or not is_channels_last(y) else y.shape
        return (y, z, mean, invstd) if saves else (y,)

    given, read = call.inputs(), call.in_channels_last().inputs()
    plan = plans.record(forward, read + call.buffers())
    if plan is None:
        return None
    in_place = all(a is b for a, b in zip(given, read, strict=True))
    writes = call.training and any(buffer is not None for buffer in call.buffers())
    return Planned(plan, call.spec, call.training, saves, copied, in_place, writes)
