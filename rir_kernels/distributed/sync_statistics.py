"""Batch statistics over the ranks of a process group: the two reductions that the operation is cut at, and who runs it.

Each rank has the moments of its own pixels; one gather of (mean, M2, count) and Chan's formula, in the order of the
ranks, give every rank the same bits. Backward needs the means of dy' and dy' * xhat over all pixels: one more gather.
A rank without images takes part in both. The gradients of the norm's weight and bias stay the rank's own sums, as
those of every other parameter do.
"""

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..autograd import ops
from ..backends import aten, plans
from ..common.memory_format import in_channels_last, to_format
from ..dispatch import calls
from . import halves
from .ranks import KernelRanks, Ranks


def _untraced(function):
    """torch.compile calls it and looks no further: collectives are in it, and launches that no op stands around."""
    untraced: list[Callable] = []

    @functools.wraps(function)
    def call(*args):
        if "torch._dynamo" not in sys.modules:  # nobody compiles, and to import the compiler would take seconds
            return function(*args)
        if not untraced:
            untraced.append(torch.compiler.disable(function))
        return untraced[0](*args)

    return call


_checked = plans.Kinds()  # by `eager.kind_of`, and how many ranks there are


def repeat(kind, group, tensors, buffers, momentum) -> torch.Tensor | None:
    """y of a call like an earlier one, which was checked; None where there was none."""
    checked = _checked.get((kind, group.size()))
    if checked is None:
        return None
    if calls.on():
        impl = checked.impl
        calls.ran(tensors[0], tensors[1], checked.spec, True, asked=impl, meant=impl, impl=impl)
    if checked.in_place is not True:
        read = in_channels_last(tensors)
        checked.in_place = all(a is b for a, b in zip(tensors, read, strict=True))
        tensors = read
    return _by_kernels(group, tensors, buffers, momentum, checked)


@_untraced
def conv_bn_act(group, tensors, buffers, momentum, spec, impl, channels_last, kernels, kind=None) -> torch.Tensor:
    """y in that format, in training; the buffers are updated.

    tensors: x, weight, bias, bn_weight, bn_bias, residuals; buffers: running_mean, running_var, num_batches_tracked, or
    Nones. kernels: whether ranks that have images run kernels; impl: "triton" and "hybrid", with tensors as the
    registered op has them and images in x; all others are ATen ops. kind: of calls that are like this one.
    """
    if impl in ("hybrid", "triton"):
        if kind is None and (metadata := plans.metadata((*tensors, *buffers))) is not None:
            kind = metadata, spec, impl, channels_last  # as the compiler's graphs call it, between two of them
        key = kind, group.size()
        checked = _checked.get(key)
        if checked is None:
            checked = _Kind(spec, impl, channels_last, tensors[0], buffers, repeats=kind is not None)
            if kind is not None:
                _checked.remember(key, checked)
        return _by_kernels(group, tensors, buffers, momentum, checked)
    x, weight, bias, bn_weight, bn_bias, *residuals = tensors
    z = aten.before_norm(x, weight, bias, residuals, spec)
    ranks = KernelRanks(group, z.shape[1]) if kernels else Ranks(group)
    y = aten.after_norm(_norm(ranks, z, bn_weight, bn_bias, spec.eps), residuals, spec)
    y = to_format(y, channels_last)  # before the buffers are updated: where memory ends, nothing has changed
    running_mean, running_var, batches = buffers
    ranks.update_running(running_mean, running_var, momentum)
    if batches is not None:
        batches.add_(1)
    return y


def _by_kernels(group, tensors, buffers, momentum, kind):
    # memory for another format is taken before the buffers are updated: where it ends, nothing has changed
    x, weight = tensors[:2]
    copy = None if kind.channels_last else x.new_empty(kind.spec.output_shape(x, weight))
    *running, batches = buffers
    dense = running if kind.dense else [buffer.contiguous() for buffer in running]
    call = _FusedCall(Ranks(group), kind)
    updated = (*dense, batches if kind.counts else None)
    _, y = ops.ConvBNActFunction.apply(call, updated, momentum, kind.spec, True, kind.impl, *tensors)
    if not kind.dense:
        for buffer, values in zip(running, dense, strict=True):
            buffer.copy_(values)
    if kind.counts:  # of the statistics torch leaves the version as it is
        torch.autograd.graph.increment_version([batches])
    elif batches is not None:
        batches.add_(1)
    return y if copy is None else copy.copy_(y)


def _norm(ranks, z, weight, bias, eps):
    wide = torch.promote_types(z.dtype, torch.float32)  # torch's norm wants its four vectors in one dtype
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return _BatchNorm.apply(ranks, eps, z, weight, bias)


class _Kind:
    """What calls of one kind have in common: how they were checked, and the plans of their halves.

    repeats: whether others like this one will come.
    """

    def __init__(self, spec, impl, channels_last, x, buffers, repeats):
        self.spec, self.impl, self.channels_last, self.repeats = spec, impl, channels_last, repeats
        self.in_place: bool | None = None  # whether the kernels can read the tensors where they are
        *running, batches = buffers
        # a kernel reads the values of the channels one behind the other, and counts on its own device alone
        self.dense = all(buffer is None or buffer.is_contiguous() for buffer in running)
        self.counts = batches is not None and batches.device == x.device
        self.moments = plans.Repeated(halves.moments, (spec, impl), repeats)
        self.normalize = plans.Repeated(halves.normalize, spec, repeats)
        self._backward = {}

    def backward(self, tensors, needs, relu):
        """Both halves, for tensors and needs like these."""
        metadata = plans.metadata(tensors) if self.repeats else None
        key = None if metadata is None else (metadata, needs, relu)
        if key is None or key not in self._backward:
            repeats = key is not None
            self._backward[key] = (
                plans.Repeated(halves.sums, self.spec, repeats),
                plans.Repeated(halves.gradients, (self.spec, self.impl, needs, relu), repeats),
            )
        return self._backward[key]


class _FusedCall:
    """What ops.ConvBNActFunction runs in place of a plan (eager.Planned)."""

    def __init__(self, ranks, kind):
        self._ranks, self._kind = ranks, kind

    def plan(self, tensors, scalars):
        x, weight, bias, gamma, beta, *residuals, running_mean, running_var, batches = tensors
        before, after = ([], residuals) if self._kind.spec.post_norm else (residuals, [])
        z, row = self._kind.moments((x, weight, bias, *before))
        rows = self._ranks.gather(row)
        norm = (x if z is None else z, rows, gamma, beta, running_mean, running_var, batches)
        y, mean, invstd, self._ranks.count = self._kind.normalize((*norm, *after), scalars)
        return y, z, mean, invstd

    def gradients(self, tensors, needs, sums=None, upstream=None):
        dy, _, _, z, y, *per_channel = tensors
        *norm, relu = upstream or (None,)
        sum_up, gradients = self._kind.backward((*tensors, *norm), tuple(needs), relu)
        need_x, need_weight, need_bias, need_gamma, need_beta, need_residual = needs
        # by what requires a gradient before the norm, as on a rank that has no images
        exchanges = need_x or need_weight or need_bias or (need_residual and not self._kind.spec.post_norm)
        rows = dgamma = dbeta = None
        if exchanges or need_gamma or need_beta:
            channels = z.shape[1]
            if sums is None:
                (row,) = sum_up((dy, z, y, *per_channel))
            else:
                row = F.pad(torch.stack(sums), (0, -channels % 4)).view(-1)
            pitch = row.numel() // 2
            dbeta, dgamma = row[:channels], row[pitch : pitch + channels]
            rows = self._ranks.gather(row) if exchanges else None
        found = gradients((dy, *tensors[1:], rows, self._ranks.count, *norm))
        return (*found[:3], dgamma if need_gamma else None, dbeta if need_beta else None, *found[5:])


class _BatchNorm(torch.autograd.Function):
    """Normalizing with given statistics is what torch's norm does in evaluation, in one pass: so is each half here."""

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
        return None, None, *ops.first_order(gradients, refusal, *saved, dy)

    @staticmethod
    def _gradients(ctx, dy, z, weight, mean, var, invstd):
        needs_dz, needs_dweight, needs_dbias = ctx.needs_input_grad[2:]
        scale = torch.ones_like(mean) if weight is None else weight  # its dtype is that of the sums
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
