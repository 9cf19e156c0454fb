"""The operation as registered ops, one per direction, and the autograd.Function that joins them.

The ops are functional: they return the batch statistics, and whoever owns the running ones updates them. Outputs that
were not asked for are empty tensors of shape (0,). Everything is channels_last; no output aliases another or an input.
Without a weight there is no convolution: x, dense and joined by nothing before the norm, is z, whose output is empty.
"""

import dataclasses

import torch

from ..backends import fused, plans
from ..common.memory_format import empty_channels_last
from ..common.spec import ConvBNActSpec
from ..common.stream_views import producer
from . import recomputation
from .backward_fusion import Link

_SPEC = (
    "int[2] stride, int[2] padding, int[2] dilation, int groups, int shortcut_channels, bool post_norm, "
    "float branch_scale, float eps, bool relu"
)
_library = torch.library.Library("rir_kernels", "DEF")
_library.define(
    "conv_bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, "
    f"Tensor? running_var, Tensor[] residuals, {_SPEC}, bool training, bool save, str impl) "
    "-> (Tensor y, Tensor z, Tensor mean, Tensor var, Tensor invstd)"
)
_library.define(
    "conv_bn_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor z, Tensor? y, Tensor mean, Tensor invstd, "
    f"Tensor? bn_weight, Tensor? bn_bias, {_SPEC}, bool training, bool[6] needs, str impl) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dbn_weight, Tensor dbn_bias, Tensor dresidual)"
)


def conv_bn_act(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residuals, spec, *, training, impl):
    """(y, batch mean, biased batch var); the statistics are fp32, and empty in evaluation."""
    tensors = (x, weight, bias, bn_weight, bn_bias, *residuals)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return ConvBNActFunction.apply(
            None, (running_mean, running_var), 0.0, spec, training, impl,
            x, weight, bias, bn_weight, bn_bias, *residuals,
        )[1:]  # fmt: skip
    y, _, mean, var, _ = torch.ops.rir_kernels.conv_bn_act(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residuals, *_flat(spec), training, False, impl
    )
    return y, mean, var


_REFUSAL = (
    'impl="triton" and impl="hybrid" have no second derivatives: use impl="torch" (or use_impl("torch")) where '
    "gradients are differentiated again"
)
_X, _RESIDUALS = 6, 11  # where x and the residuals stand among the function's arguments


class ConvBNActFunction(torch.autograd.Function):
    """(root, y, batch mean, biased batch var) by the registered op; or (root, y), by `planned`.

    planned: an eager.Planned, which updates the buffers too, or whatever else has its `plan` and `gradients`.
    root: empty, and not to be used. It is how backward knows its own node, see `first_order`.
    """

    @staticmethod
    def forward(ctx, planned, buffers, momentum, spec, training, impl, *tensors):
        x, weight, bias, bn_weight, bn_bias, *residuals = tensors
        root = x.new_empty(0)  # first, since a plan updates buffers: where memory ends, nothing has changed
        if planned is None:
            y, z, mean, var, invstd = torch.ops.rir_kernels.conv_bn_act(
                x, weight, bias, bn_weight, bn_bias, *buffers, residuals, *_flat(spec), training, True, impl
            )
        else:
            y, z, mean, invstd = planned.plan(tensors + buffers, (momentum,))
        if weight is None:
            z, x = x.detach(), None
        # after the norm the ReLU's mask is that of the sum: z alone does not tell it, nor what a factor has turned
        told_by_z = not (spec.post_norm and (len(residuals) > 0 or spec.norm_scale <= 0))
        if told_by_z:
            recomputation.remember(y, z, mean, invstd, bn_weight, bn_bias, spec)
        mask = None if told_by_z or not spec.relu else y
        ctx.save_for_backward(x, weight, bn_weight, bn_bias, z, mean, invstd, mask, root)
        ctx.link = None
        ctx.call = planned, spec, training, impl, [residual.shape[1] for residual in residuals]
        if planned is not None:
            ctx.ahead = _links((tensors[0], *residuals))
            chained = training and told_by_z and spec.norm_scale == 1 and recomputation.saves_in_place(z)
            ctx.link = Link((z, mean, invstd, bn_weight, bn_bias, spec.relu) if chained else None)
            return root, y
        ctx.mark_non_differentiable(mean, var)
        return root, y, mean, var

    @staticmethod
    def backward(ctx, _, dy, *__):
        *saved, root = ctx.saved_tensors
        with torch.no_grad():
            grads = ConvBNActFunction._gradients(ctx, dy, *saved)
        return first_order(grads, _REFUSAL, root, dy)

    @staticmethod
    def _gradients(ctx, dy, x, weight, bn_weight, bn_bias, z, mean, invstd, mask):
        x = z if weight is None else x
        planned, spec, training, impl, residual_channels = ctx.call
        needed = ctx.needs_input_grad
        needs = [*needed[_X : _X + 5], any(needed[_RESIDUALS:])]
        tensors = (dy, x, weight, z, mask, mean, invstd, bn_weight, bn_bias)
        found = None
        if planned is not None:
            upstream = ctx.ahead.norm if ctx.ahead is not None and ctx.ahead.offers_sums() and needs[0] else None
            found = planned.gradients(tensors, needs, ctx.link.take(dy), upstream)
        if found is None:
            found = torch.ops.rir_kernels.conv_bn_act_backward(*tensors, *_flat(spec), training, needs, impl)
        *grads, dresidual = found[:6]
        if len(found) > 6 and found[6] is not None:
            ctx.ahead.leave(grads[0], found[6:])
        alike = (x, weight, x, bn_weight, bn_bias)  # in dtype; a bias has x's
        grads = [grad.to(t.dtype) if need else None for grad, need, t in zip(grads, needs, alike, strict=False)]
        if grads[1] is not None and weight.is_contiguous():
            # in the weight's own strides, which DDP's buckets expect: those of a 1x1 kernel too, where both formats fit
            grads[1] = grads[1].contiguous().as_strided(weight.shape, weight.stride())
        dresiduals = [
            dresidual[:, :channels] if need else None
            for channels, need in zip(residual_channels, needed[_RESIDUALS:], strict=True)
        ]
        return (*[None] * _X, *grads, *dresiduals)


def _links(tensors):
    """The link of the layer whose output the first tensor is, None where it is none's; each such layer is told."""
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
    """The gradients, within backward; under create_graph=True they raise `refusal` where they are differentiated.

    origins: tensors of the graph that what the gradients depend on is reached from. autograd.grad walks only where the
    way leads to what it was asked for: gradients that nothing leads on from would count as constants, silently. Hence
    not torch's once_differentiable, which knows dy alone.
    """
    if not torch.is_grad_enabled():
        return grads
    return _FirstOrder.apply(refusal, len(origins), *origins, *grads)


class _FirstOrder(torch.autograd.Function):
    """Passes gradients on, and raises where one of them is differentiated in turn."""

    @staticmethod
    def forward(ctx, refusal, origins, *tensors):
        ctx.refusal = refusal
        return tuple(None if grad is None else grad.clone() for grad in tensors[origins:])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.refusal)


def _flat(spec: ConvBNActSpec):
    return tuple(getattr(spec, field.name) for field in dataclasses.fields(spec))


def _spec(values) -> ConvBNActSpec:
    stride, padding, dilation, *rest = values
    return ConvBNActSpec(tuple(stride), tuple(padding), tuple(dilation), *rest)


def _hashable(options):
    return tuple([tuple(option) if isinstance(option, list) else option for option in options])


def _or_empty(tensors, like):
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _forward(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residuals, *options):
    tensors = (x, weight, bias, bn_weight, bn_bias, running_mean, running_var, *residuals)
    return _or_empty(plans.run(_launch_forward, _hashable(options), tensors), x)


def _launch_forward(options, _, x, weight, bias, bn_weight, bn_bias, running_mean, running_var, *residuals):
    *spec, training, save, impl = options
    return fused.forward(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residuals, _spec(spec),
        training=training, save=save, impl=impl,
    )  # fmt: skip


def _forward_fake(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residuals, *rest):
    *spec, training, save, _impl = rest
    shape = _spec(spec).output_shape(x, weight)
    y = empty_channels_last(shape, x)
    keep = training or save
    statistics = [x.new_empty(shape[1], dtype=torch.float32) if keep else x.new_empty(0) for _ in range(3)]
    if not training:
        statistics[1] = x.new_empty(0)
    return y, torch.empty_like(y) if keep and weight is not None else x.new_empty(0), *statistics


def _backward(dy, x, weight, z, y, mean, invstd, bn_weight, bn_bias, *options):
    tensors = (dy, x, weight, z, y, mean, invstd, bn_weight, bn_bias)
    return _or_empty(plans.run(_launch_backward, _hashable(options), tensors), x)


def _launch_backward(options, _, dy, x, weight, z, y, mean, invstd, bn_weight, bn_bias):
    *spec, training, needs, impl = options
    return fused.backward(
        dy, x, weight, z, y, mean, invstd, bn_weight, bn_bias, _spec(spec), training=training, needs=needs, impl=impl
    )


def _backward_fake(dy, x, weight, z, y, mean, invstd, bn_weight, bn_bias, *rest):
    needs = rest[-2]
    channels = mean.shape
    shapes = (x.shape, None if weight is None else weight.shape, channels, channels, channels, z.shape)
    return tuple(
        x.new_empty(0) if not need else mean.new_empty(shape) if shape is channels else empty_channels_last(shape, x)
        for need, shape in zip(needs, shapes, strict=True)
    )


for _name, _implementation, _fake in (
    ("conv_bn_act", _forward, _forward_fake),
    ("conv_bn_act_backward", _backward, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rir_kernels::{_name}", _fake, lib=_library)
