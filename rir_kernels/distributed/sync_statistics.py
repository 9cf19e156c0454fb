"""Batch statistics over the ranks of a process group: the two reductions that split the operation, and its runners.

Each rank has the moments of its own pixels; one gather of (mean, M2, count) and Chan's formula, in rank order, give
every rank the same bits. Backward needs the means of dy' and dy' * xhat over all pixels: one more gather. A rank
without images takes part in both. The gradients of the norm's weight and bias stay the rank's own sums, like those of
every other parameter.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..autograd.function import Backward, ConvBNActFunction, first_order
from ..backends import aten, plans
from ..common.arguments import OUR_KERNELS
from ..common.call import Call
from ..common.memory_format import to_format
from . import halves
from .ranks import KernelRanks, Ranks


def _untraced(function):
    """torch.compile calls the function without tracing it: it has collectives, and launches that no op wraps."""
    untraced: list[Callable] = []

    @functools.wraps(function)
    def call(*args):
        if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing the compiler takes seconds
            return function(*args)
        if not untraced:
            untraced.append(torch.compiler.disable(function))
        return untraced[0](*args)

    return call


_kinds = plans.Kinds()  # keyed by a call's signature and the number of ranks


def find(signature, group) -> "KernelsOfRanks | None":
    """The runner of an earlier call with this signature, which was checked; None if there was none."""
    kind = _kinds.get((signature, group.size()))
    return None if kind is None else KernelsOfRanks(group, kind)


@_untraced
def run(group, call: Call, impl: str, by_kernels: bool, channels_last: bool, signature=None) -> torch.Tensor:
    """Returns y in that format, in training, and updates the buffers.

    impl: "triton" and "hybrid" require contiguous vectors and images in x; any other runs ATen ops. by_kernels: whether
    ranks that have images run kernels. signature: shared by calls like this one.
    """
    if impl not in OUR_KERNELS:
        return _by_operators(group, call, by_kernels, channels_last)
    if signature is None and (metadata := plans.metadata((*call.inputs(), *call.buffers()))) is not None:
        signature = metadata, call.spec, impl, channels_last  # for a call between two graphs of torch.compile
    key = signature, group.size()
    kind = _kinds.get(key)
    if kind is None:
        kind = _Kind(call, impl, channels_last, repeats=signature is not None)
        if signature is not None:
            _kinds.remember(key, kind)
    return KernelsOfRanks(group, kind)(call)


def _by_operators(group, call, by_kernels, channels_last):
    z = aten.before_norm(call.x, call.weight, call.bias, call.residuals, call.spec)
    ranks = KernelRanks(group, z.shape[1]) if by_kernels else Ranks(group)
    y = _norm(ranks, z, call.bn_weight, call.bn_bias, call.spec.eps)
    y = aten.after_norm(y, call.residuals, call.spec)
    y = to_format(y, channels_last)  # first, so an out-of-memory error leaves the buffers untouched
    ranks.update_running(call.running_mean, call.running_var, call.momentum)
    if call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
    return y


class _Kind:
    """What calls of one kind share: the results of their checks, and the plans of their halves.

    repeats: whether more calls like this one may follow.
    """

    def __init__(self, call: Call, impl: str, channels_last: bool, repeats: bool):
        spec = call.spec
        self.spec, self.impl, self.channels_last, self.repeats = spec, impl, channels_last, repeats
        self.in_place = False  # whether the kernels are known to read the tensors where they are
        *running, batches = call.buffers()
        # a kernel expects contiguous per-channel vectors, and counts on its own device only
        self.dense = all(buffer is None or buffer.is_contiguous() for buffer in running)
        self.counts = batches is not None and batches.device == call.x.device
        self.moments = plans.Repeated(halves.moments, (spec, impl), repeats)
        self.normalize = plans.Repeated(halves.normalize, spec, repeats)
        self._backward: dict[tuple | None, tuple[plans.Repeated, plans.Repeated]] = {}

    def backward(self, tensors, needs, activation):
        """Returns both halves, for tensors and needs like these."""
        metadata = plans.metadata(tensors) if self.repeats else None
        key = None if metadata is None else (metadata, needs, activation)
        if key is None or key not in self._backward:
            repeats = key is not None
            self._backward[key] = (
                plans.Repeated(halves.sums, self.spec, repeats),
                plans.Repeated(halves.gradients, (self.spec, self.impl, needs, activation), repeats),
            )
        return self._backward[key]


class KernelsOfRanks:
    """Runs a layer's kernels in training; between its halves the ranks exchange their statistics."""

    chains = True
    training = True

    def __init__(self, group, kind: "_Kind"):
        self._ranks, self._kind = Ranks(group), kind
        self.spec, self.impl = kind.spec, kind.impl

    def __call__(self, call: Call) -> torch.Tensor:
        kind = self._kind
        if not kind.in_place:
            given, call = call, call.in_channels_last()
            kind.in_place = all(a is b for a, b in zip(given.inputs(), call.inputs(), strict=True))
        # first, so an out-of-memory error leaves the buffers untouched
        copy = None if kind.channels_last else call.x.new_empty(kind.spec.output_shape(call.x, call.weight))
        running: list[Any] = [call.running_mean, call.running_var]
        batches = call.num_batches_tracked
        dense = running if kind.dense else [buffer.contiguous() for buffer in running]
        if not kind.dense or (batches is not None and not kind.counts):
            counter = batches if kind.counts else None
            call = call.having(running_mean=dense[0], running_var=dense[1], num_batches_tracked=counter)
        _, y = ConvBNActFunction.apply(self, call, *call.inputs())
        if not kind.dense:
            for buffer, values in zip(running, dense, strict=True):
                buffer.copy_(values)
        if batches is not None and kind.counts:  # torch does not bump the version of the statistics
            torch.autograd.graph.increment_version([batches])
        elif batches is not None:
            batches.add_(1)
        return y if copy is None else copy.copy_(y)

    def forward(self, call: Call) -> tuple:
        before, after = ((), call.residuals) if self.spec.post_norm else (call.residuals, ())
        z, row = self._kind.moments((call.x, call.weight, call.bias, *before))
        rows = self._ranks.gather(row)
        norm = (call.x if z is None else z, rows, call.bn_weight, call.bn_bias, *call.buffers())
        y, mean, invstd, self._ranks.count = self._kind.normalize((*norm, *after), (call.momentum,))
        return y, z, mean, invstd

    def backward(self, tensors: Backward, needs, spec, training, sums=None, upstream=None):
        *norm, activation = upstream or (None,)
        sum_up, gradients = self._kind.backward((*tensors, *norm), tuple(needs), activation)
        need_x, need_weight, need_bias, need_gamma, need_beta, need_residual = needs
        # depends on what requires a gradient before the norm, as on a rank without images
        exchanges = need_x or need_weight or need_bias or (need_residual and not spec.post_norm)
        rows = dgamma = dbeta = None
        if exchanges or need_gamma or need_beta:
            channels = tensors.z.shape[1]
            if sums is None:
                (row,) = sum_up((tensors.dy, *tensors[3:]))
            else:
                row = F.pad(torch.stack(sums), (0, -channels % 4)).view(-1)
            pitch = row.numel() // 2
            dbeta, dgamma = row[:channels], row[pitch : pitch + channels]
            rows = self._ranks.gather(row) if exchanges else None
        found = gradients((*tensors, rows, self._ranks.count, *norm))
        return (*found[:3], dgamma if need_gamma else None, dbeta if need_beta else None, *found[5:])


def _norm(ranks, z, weight, bias, eps):
    wide = torch.promote_types(z.dtype, torch.float32)  # torch's norm requires its four vectors in one dtype
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return _BatchNorm.apply(ranks, eps, z, weight, bias)


class _BatchNorm(torch.autograd.Function):
    """Each half runs torch's norm in evaluation mode, which uses given statistics and takes one pass."""

    @staticmethod
    def forward(ctx, ranks, eps, z, weight, bias):
        wide = torch.promote_types(z.dtype, torch.float32)
        if z.numel() > 0:
            var, mean = torch.var_mean(z.to(wide), (0, 2, 3), correction=0)
        else:
            mean = var = z.new_zeros(z.shape[1], dtype=wide)
        mean, var, invstd = ranks.merge(mean, var, z.numel() // z.shape[1], eps)
        ctx.ranks, ctx.eps = ranks, eps
        ctx.save_for_backward(z, weight, mean, var, invstd)
        if z.numel() == 0:
            return torch.empty_like(z)
        return F.batch_norm(z, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _BatchNorm._gradients(ctx, dy, *saved)
        refusal = "a norm synchronized over ranks has no second derivatives"
        return None, None, *first_order(gradients, refusal, *saved, dy)

    @staticmethod
    def _gradients(ctx, dy, z, weight, mean, var, invstd):
        needs_dz, needs_dweight, needs_dbias = ctx.needs_input_grad[2:]
        scale = torch.ones_like(mean) if weight is None else weight  # its dtype determines that of the sums
        if z.numel() > 0:
            _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                dy, z, scale, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
        else:
            dweight, dbias = torch.zeros_like(mean), torch.zeros_like(mean)
        dz = None
        if needs_dz:
            mean_dy, mean_dy_xhat = (m[:, None, None] for m in ctx.ranks.means((dbias, dweight)))
            mean, invstd, scale = (t[:, None, None] for t in (mean, invstd, scale))
            dz = ((dy - mean_dy - (z - mean) * (invstd * mean_dy_xhat)) * (scale * invstd)).to(z.dtype)
        return dz, dweight if needs_dweight else None, dbias if needs_dbias else None
