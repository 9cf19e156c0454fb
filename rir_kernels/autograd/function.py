"""The autograd.Function of a layer that runs our kernels, through any launcher (`Kernels`).

Cross-layer: each node tells the layers after it what their backward can compute for it (`backward_fusion`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch

from ..common.call import Call
from ..common.spec import ConvBNActSpec
from ..common.stream_views import producer
from . import recomputation
from .backward_fusion import Link

_REFUSAL = (
    'impl="triton" and impl="hybrid" have no second derivatives: use impl="torch" (or use_impl("torch")) where '
    "gradients are differentiated again"
)


class Backward(NamedTuple):
    """The tensors that a layer's backward reads, in the order of the registered op's arguments.

    y: given if its sign gives the activation's derivative; None if z determines it.
    """

    dy: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor | None
    z: torch.Tensor
    y: torch.Tensor | None
    mean: torch.Tensor
    invstd: torch.Tensor
    bn_weight: torch.Tensor | None
    bn_bias: torch.Tensor | None


class Kernels(Protocol):
    """Launches a layer's kernels: the registered op, a recorded plan, or the ranks of a group together."""

    chains: bool  # whether `backward` uses the sums that the next layer computed, and computes such sums

    def forward(self, call: Call) -> tuple[torch.Tensor | None, ...]:
        """Returns (y, z, mean, invstd) and the batch statistics to hand out; z is ignored if it is x."""
        ...

    def backward(
        self, tensors: Backward, needs: Sequence[bool], spec: ConvBNActSpec, training: bool, sums=None, upstream=None
    ) -> Sequence[torch.Tensor | None]:
        """Returns the gradients of x, weight, bias, bn_weight, bn_bias and of a residual that `needs` asks for.

        sums: dbeta and dgamma, if known. upstream: z, mean, invstd, weight, bias and activation of the norm whose
        output x is: its two sums may follow the six gradients, or two Nones.
        """
        ...


class ConvBNActFunction(torch.autograd.Function):
    """Returns (root, y) and the batch statistics that `kernels` hands out.

    root: empty, not for use. Through it backward identifies its own node, see `first_order`.
    """

    @staticmethod
    def forward(ctx, kernels: Kernels, call: Call, *inputs):
        if call.x is None:  # torch.compile must see the inputs only once
            call = call.with_inputs(*inputs)
        x, weight, spec, residuals = call.x, call.weight, call.spec, call.residuals
        root = x.new_empty(0)  # first, as the buffers may be updated next: an out-of-memory error leaves them untouched
        y, z, mean, invstd, *statistics = kernels.forward(call)
        if weight is None:
            z, x = x.detach(), None
        determined = call.derivative_from_z()
        if determined:
            recomputation.remember(y, z, mean, invstd, call.bn_weight, call.bn_bias, spec)
        sign = None if determined or spec.activation is None else y
        ctx.save_for_backward(x, weight, z, sign, mean, invstd, call.bn_weight, call.bn_bias, root)
        ctx.kernels, ctx.spec, ctx.training = kernels, spec, call.training
        ctx.residual_channels = [residual.shape[1] for residual in residuals]
        ctx.ahead = ctx.link = None
        if kernels.chains:
            ctx.ahead = _links((inputs[0], *residuals))
            chained = call.training and determined and spec.norm_scale == 1 and recomputation.saves_in_place(z)
            ctx.link = Link((z, mean, invstd, call.bn_weight, call.bn_bias, spec.activation) if chained else None)
        ctx.mark_non_differentiable(*statistics)
        return root, y, *statistics

    @staticmethod
    def backward(ctx, _, dy, *__):
        x, weight, z, *others, root = ctx.saved_tensors
        with torch.no_grad():
            tensors = Backward(dy, z if weight is None else x, weight, z, *others)
            gradients = ConvBNActFunction._gradients(ctx, tensors)
        return first_order((None, None, *gradients), _REFUSAL, root, dy)

    @staticmethod
    def _gradients(ctx, tensors: Backward):
        need_x, need_weight, need_bias, need_gamma, need_beta, *need_residuals = ctx.needs_input_grad[2:]
        needs = [need_x, need_weight, need_bias, need_gamma, need_beta, any(need_residuals)]
        sums = upstream = None
        if ctx.link is not None:
            sums = ctx.link.claim(tensors.dy)
            upstream = ctx.ahead.norm if ctx.ahead is not None and ctx.ahead.offers_sums() and need_x else None
        found = ctx.kernels.backward(tensors, needs, ctx.spec, ctx.training, sums, upstream)
        *grads, dresidual = found[:6]
        if len(found) > 6 and found[6] is not None:
            ctx.ahead.offer(grads[0], found[6:])
        x, weight = tensors.x, cast(torch.Tensor, tensors.weight)
        alike: Any = (x, weight, x, tensors.bn_weight, tensors.bn_bias)  # the gradients' dtypes; a bias has x's
        grads = [grad.to(t.dtype) if need else None for grad, need, t in zip(grads, needs, alike, strict=False)]
        if grads[1] is not None and weight.is_contiguous():
            # in the weight's own strides, which DDP's buckets expect, even for a 1x1 kernel, which fits both formats
            grads[1] = grads[1].contiguous().as_strided(weight.shape, weight.stride())
        dresiduals = [
            dresidual[:, :channels] if need else None
            for channels, need in zip(ctx.residual_channels, need_residuals, strict=True)
        ]
        return (*grads, *dresiduals)


def _links(tensors):
    """Returns the link of the layer that produced the first tensor, or None; counts a consumer on each producer."""
    ahead = None
    for index, tensor in enumerate(tensors):
        node, whole = producer(tensor)
        link = None
        if isinstance(node, ConvBNActFunction._backward_cls):
            link = node.link  # type: ignore[attr-defined] # mypy knows no class of nodes
        if link is not None:
            link.consumers += 1
            ahead = link if index == 0 and whole else ahead
    return ahead


def first_order(grads, refusal: str, *origins):
    """Returns the gradients, within backward; under create_graph=True differentiating them raises `refusal`.

    origins: graph tensors from which everything that the gradients depend on can be reached. autograd.grad only follows
    paths to the inputs it was asked for: gradients without such a path would silently count as constants. Hence not
    torch's once_differentiable, which only knows dy.
    """
    if not torch.is_grad_enabled():
        return grads
    return _FirstOrder.apply(refusal, len(origins), *origins, *grads)


class _FirstOrder(torch.autograd.Function):
    """Passes gradients on, and raises if one of them is differentiated again."""

    @staticmethod
    def forward(ctx, refusal, origins, *tensors):
        ctx.refusal = refusal
        return tuple(None if grad is None else grad.clone() for grad in tensors[origins:])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.refusal)
