"""Batch statistics over the ranks of a process group: the two reductions that the operation is cut at, and who runs it.

Each rank has the moments of its own pixels; one gather of (mean, M2, count) and Chan's formula, in the order of the
ranks, give every rank the same bits. Backward needs the means of dy' and dy' * xhat over all pixels: one more gather.
A rank without images takes part in both. The gradients of the norm's weight and bias stay the rank's own sums, as
those of every other parameter do.
"""

import functools
import importlib
import sys

import torch
import torch.nn.functional as F

from . import aten, fused, ops
from .layout import to_format


def _untraced(function):
    """torch.compile calls it and looks no further: collectives are in it, and launches that no op stands around."""
    untraced: list = []

    @functools.wraps(function)
    def call(*args):
        if "torch._dynamo" not in sys.modules:  # nobody compiles, and to import the compiler would take seconds
            return function(*args)
        if not untraced:
            untraced.append(torch.compiler.disable(function))
        return untraced[0](*args)

    return call


@_untraced
def conv_bn_act(group, tensors, statistics, momentum, spec, impl, channels_last) -> torch.Tensor:
    """y in that format, in training.

    tensors: x, weight, bias, bn_weight, bn_bias, residuals; statistics: the running ones, or Nones.
    impl: "triton" and "hybrid", with tensors as the registered op has them and images in x; all others are ATen ops.
    """
    ranks = _Ranks(group)
    if impl in ("hybrid", "triton"):
        _, y = ops.ConvBNActFunction.apply(_FusedCall(ranks, spec, impl), (), 0.0, spec, True, impl, *tensors)
    else:
        x, weight, bias, bn_weight, bn_bias, *residuals = tensors
        z = aten.before_norm(x, weight, bias, residuals, spec)
        y = aten.after_norm(_norm(ranks, z, bn_weight, bn_bias, spec.eps), residuals, spec)
    y = to_format(y, channels_last)  # before the buffers are updated: where memory ends, nothing has changed
    ranks.update_running(statistics[0], statistics[1], momentum)
    return y


def _norm(ranks, z, weight, bias, eps):
    wide = torch.promote_types(z.dtype, torch.float32)  # torch's norm wants its four vectors in one dtype
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return _BatchNorm.apply(ranks, eps, z, weight, bias)


class _Ranks:
    """The ranks of a group, during one call and its backward."""

    # of all ranks, by `merge`; var is biased, count a tensor: reading it would wait
    mean: torch.Tensor
    var: torch.Tensor
    count: torch.Tensor

    def __init__(self, group):
        self._group = group

    def merge(self, mean, var, count: int, eps: float):
        """(mean, biased var, invstd) of all ranks, from those of the `count` pixels that are here."""
        channels = mean.numel()
        gathered = self._gather(torch.cat([mean, var * count, mean.new_full((1,), count)]))
        means, m2s, counts = gathered.split([channels, channels, 1], dim=1)
        self.count = counts.sum()
        # deviations from the mean of one rank that has any: sums of small numbers, where the means may be large
        anchor = means.index_select(0, counts.argmax(0))
        shifts = means - anchor
        shift = (counts * shifts).sum(0) / self.count
        self.mean = anchor[0] + shift
        self.var = (m2s + counts * (shifts - shift).square()).sum(0) / self.count
        return self.mean, self.var, (self.var + eps).rsqrt()

    def means(self, sums):
        """Each sum over the pixels of this rank -> the mean over those of all."""
        gathered = self._gather(torch.cat(sums))
        return (gathered.sum(0) / self.count).chunk(len(sums))

    def _gather(self, vector):
        """[ranks, n]; sums over it have one order, where the one of an all-reduce is the backend's affair."""
        gathered = vector.new_empty(torch.distributed.get_world_size(self._group), vector.numel())
        torch.distributed.all_gather(list(gathered), vector, group=self._group)
        return gathered

    @torch.no_grad()
    def update_running(self, running_mean, running_var, momentum) -> None:
        """As torch.nn.functional.batch_norm does it, where there are any; nothing where no rank had a pixel."""
        if running_mean is None:
            return
        unbiased = self.var * (self.count / (self.count - 1).clamp(min=1))  # torch's SyncBatchNorm: NaN for one pixel
        moved = [
            torch.where(self.count > 0, (1 - momentum) * buffer.to(batch.dtype) + momentum * batch, buffer)
            for buffer, batch in ((running_mean, self.mean), (running_var, unbiased))
        ]
        running_mean.copy_(moved[0])  # once nothing more is allocated: both or none
        running_var.copy_(moved[1])


class _FusedCall:
    """What ops.ConvBNActFunction runs in place of a plan (eager.Planned)."""

    def __init__(self, ranks, spec, impl):
        self._ranks, self._spec, self._impl = ranks, spec, impl

    def plan(self, tensors, _momentum):
        x, weight, bias, gamma, beta, *residuals = tensors
        y, z, mean, _, invstd = fused.forward(
            x, weight, bias, gamma, beta, None, None, residuals, self._spec,
            training=True, save=True, impl=self._impl, ranks=self._ranks,
        )  # fmt: skip
        return y, z, mean, invstd

    def gradients(self, tensors, needs, sums=None, upstream=None):
        if upstream is not None:
            upstream = importlib.import_module("rir_kernels.triton.launch.batchnorm").Upstream(*upstream)
        gradients = fused.backward(  # type: ignore[misc] # mypy takes a star for all that may follow
            *tensors, self._spec, training=True, needs=needs, impl=self._impl,
            upstream=upstream, sums=sums, ranks=self._ranks,
        )  # fmt: skip
        return gradients if upstream is None else (*gradients[:6], *(gradients[6] or (None, None)))


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
