"""The one operation: convolution, batch norm, residual, activation.

    z = branch_scale * (conv(x, W) + bias) + [residual | 0]     residual_at="pre_norm": RiR, the norm sees the sum
    y = act(norm(z))

    y = act(branch_scale * norm(conv(x, W) + bias) + [residual | 0])     residual_at="post_norm": an ordinary ResNet

The norm uses the batch's statistics in training and the running ones otherwise. `norm_act` leaves the convolution out.
"""

import dataclasses
from collections.abc import Callable

import torch

from .autograd import ops
from .backends import aten
from .common.memory_format import as_channels_last, as_rows, conv_format, is_channels_last, to_format, warn_of_copies
from .common.spec import ConvBNActSpec
from .dispatch import calls, plan_cache
from .dispatch.choose import plainly_eager, resolve
from .dispatch.preference import check_impl
from .dispatch.tensors import FLOATS, as_residuals, autocast_dtype, build_spec, check_tensors, check_weight
from .distributed import sync_statistics
from .reference import functional as reference


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    residual_at: str = "pre_norm",
    branch_scale: float = 1.0,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
    impl: str = "auto",
) -> torch.Tensor:
    """Convolution, batch norm, residual and activation in as few passes as the device allows.

    Args:
        x: (N, C_in, H, W), contiguous or channels_last (the kernels' own format; the other one is converted).
        weight: (C_out, C_in/groups, kh, kw).
        bn_weight, bn_bias, running_mean, running_var: (C_out,) or None; x's dtype, or fp32 beside half activations.
            The statistics are updated in place when training, exactly as torch.nn.functional.batch_norm does.
        bias: (C_out,), added to the convolution's output.
        residual: (N, C_res, H', W') with C_res <= C_out, or a tuple of two such, added to the first C_res channels.
        residual_at: "pre_norm" or "post_norm".
        branch_scale: multiplies what the residual is added to, never the residual.
        activation: "relu" or None.
        impl: "auto", "reference", "torch", "hybrid" or "triton"; a name other than "auto" never falls back.

    Returns: (N, C_out, H', W') in x's dtype (autocast's, within autocast) and memory format.

    Raises, before any work: TypeError for dtypes, ValueError for shapes and values, RuntimeError for devices and
    missing statistics, ImportError and NotImplementedError where the implementation asked for cannot run.
    """
    spec = build_spec(
        residual_at=residual_at,
        branch_scale=branch_scale,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        eps=eps,
        activation=activation,
    )
    check_weight(weight)
    return apply(
        x, weight, bn_weight, bn_bias, running_mean, running_var,
        bias=bias, residuals=as_residuals(residual), spec=spec, training=training, momentum=momentum, impl=impl,
    )  # fmt: skip


def norm_act(
    x: torch.Tensor,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    residual_at: str = "post_norm",
    branch_scale: float = 1.0,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
    impl: str = "auto",
) -> torch.Tensor:
    """Batch norm, residual and activation: `conv_bn_act` without its convolution, as pre-activation blocks begin.

        y = act(norm(branch_scale * x + [residual | 0]))    "pre_norm"
        y = act(branch_scale * norm(x) + [residual | 0])    "post_norm"

    Our kernels read x twice in training and once in evaluation, and keep nothing but x for backward. A slice of
    another tensor's channels is copied first, and what joins before the norm is added to x by torch's operators.

    Args:
        x: (N, C, H, W), contiguous or channels_last (the kernels' own format; the other one is converted).
        bn_weight, bn_bias, running_mean, running_var: (C,) or None; x's dtype, or fp32 beside half activations.
            The statistics are updated in place when training, exactly as torch.nn.functional.batch_norm does.
        residual: (N, C_res, H, W) with C_res <= C, or a tuple of two such, added to the first C_res channels.
        residual_at: "pre_norm" or "post_norm".
        branch_scale: multiplies what the residual is added to, never the residual.
        activation: "relu" or None.
        impl: "auto", "reference", "torch", "hybrid" or "triton"; a name other than "auto" never falls back. "hybrid"
            and "triton" are the same here.

    Returns: (N, C, H, W) in x's dtype and memory format. Autocast does not cast x, as it does not for torch's own
    batch_norm; a residual takes x's dtype within it.

    Raises, before any work: TypeError for dtypes, ValueError for shapes and values, RuntimeError for devices and
    missing statistics, ImportError and NotImplementedError where the implementation asked for cannot run.
    """
    spec = build_spec(
        residual_at=residual_at, branch_scale=branch_scale, stride=1, padding=0, dilation=1, groups=1, eps=eps,
        activation=activation,
    )  # fmt: skip
    return apply(
        x, None, bn_weight, bn_bias, running_mean, running_var,
        residuals=as_residuals(residual), spec=spec, training=training, momentum=momentum, impl=impl,
    )  # fmt: skip


def apply(
    x,
    weight,
    bn_weight,
    bn_bias,
    running_mean,
    running_var,
    num_batches_tracked=None,
    *,
    bias=None,
    residuals=(),
    spec: ConvBNActSpec,
    training: bool,
    momentum: float,
    impl: str,
    process_group=None,
    torch_format: bool = False,
    otherwise: Callable[[Exception], torch.Tensor] | None = None,
) -> torch.Tensor:
    """`conv_bn_act` with its options as a spec, which may also name a shortcut from x itself.

    weight None leaves the convolution out, as `norm_act` does: the spec has none of its options then, nor a shortcut.
    `num_batches_tracked`, one int64 or None, counts the batch when the call has succeeded. process_group: whose ranks
    share the batch's statistics, in training; None is this one alone. torch_format: y has the memory format that
    torch's own convolution gives it, channels_last where x or weight is, rather than x's. otherwise: what makes y where
    the call is refused for its tensors or numbers, called with the error instead of raising it.
    """
    check_impl(impl)
    x, weight, bias, residuals = _autocast(x, weight, bias, residuals)
    tensors = (x, weight, bias, bn_weight, bn_bias, *residuals)
    buffers = (running_mean, running_var, num_batches_tracked)
    kind = plan_cache.kind_of(tensors, buffers, spec, training, momentum, impl, torch_format)
    if kind is not None and (y := _repeated(kind, process_group, tensors, buffers, momentum)) is not None:
        return y
    try:
        check_tensors(
            x, weight, bn_weight, bn_bias, running_mean, running_var,
            bias=bias, residuals=residuals, spec=spec, training=training, momentum=momentum,
            shared=process_group is not None,
        )  # fmt: skip
    except (TypeError, ValueError, RuntimeError) as error:
        if otherwise is None:
            raise
        return otherwise(error)
    momentum = float(momentum)  # numpy's numbers are numbers too, but not to torch's norm
    residuals = tuple(residual for residual in residuals if residual.shape[1] > 0)
    asked, impl = impl, resolve(impl, x, weight, spec, training)
    channels_last = conv_format(x, weight) if torch_format else is_channels_last(x)
    by_kernels = impl in ("hybrid", "triton")
    kernels = by_kernels and x.shape[0] > 0
    if kernels and not channels_last:
        warn_of_copies(x)
    if impl == "triton" and weight is None and not spec.post_norm and (residuals or spec.branch_scale != 1.0):
        return apply(
            to_format(aten.joined(x, residuals, spec), channels_last), None, bn_weight, bn_bias, running_mean,
            running_var, num_batches_tracked, spec=dataclasses.replace(spec, branch_scale=1.0), training=training,
            momentum=momentum, impl=impl, process_group=process_group,
        )  # fmt: skip
    if impl != "triton" or x.shape[0] == 0 or len(residuals) != len(tensors) - 5:
        kind = None
    elif kind is not None and process_group is None:
        plan_cache.prepare(kind, tensors, buffers, spec, training, channels_last)
        if (y := plan_cache.repeat(kind, tensors, buffers, momentum)) is not None:
            return y
    if calls.on():
        by = impl if kernels or (impl == "reference" and process_group is None) else "torch"
        calls.ran(x, weight, spec, training, asked=asked, meant=impl, impl=by)
    if kernels:
        x = as_rows(x) if weight is None else as_channels_last(x)
        vectors = [*map(_dense, (bias, bn_weight, bn_bias))]
        if any(dense is not given for dense, given in zip(vectors, tensors[2:5], strict=True)):
            kind = None
        tensors = (x, weight, *vectors, *map(as_channels_last, residuals))
    if process_group is not None:
        if not kernels:
            impl, tensors = "torch", (*tensors[:5], *residuals)
        return sync_statistics.conv_bn_act(
            process_group, tensors, buffers, momentum, spec, impl, channels_last, by_kernels, kind
        )
    if kernels:
        statistics = (None, None) if training else (_dense(running_mean), _dense(running_var))
        y, mean, var = ops.conv_bn_act(  # type: ignore[misc] # mypy takes a star for all that may follow
            *tensors[:5], *statistics, tensors[5:], spec, training=training, impl=impl
        )
        y = to_format(y, channels_last)  # before the buffers are updated: where memory ends, nothing has changed
        if training and running_mean is not None:
            count = y.shape[0] * y.shape[2] * y.shape[3]
            _update_running(running_mean, running_var, mean, var, momentum, count)
    else:
        y = _plain(
            _reference if impl == "reference" else aten.conv_bn_act,
            x, weight, bn_weight, bn_bias, running_mean, running_var,
            channels_last=None if torch_format else channels_last,
            bias=bias, residuals=residuals, spec=spec, training=training, momentum=momentum,
        )  # fmt: skip
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return y


def _repeated(kind, process_group, tensors, buffers, momentum):
    if process_group is None:
        return plan_cache.repeat(kind, tensors, buffers, momentum)
    return sync_statistics.repeat(kind, process_group, tensors, buffers, momentum)


def _dense(vector):
    """The kernels read the values of the channels one behind the other."""
    return None if vector is None else vector.contiguous()


def _plain(run, x, weight, bn_weight, bn_bias, running_mean, running_var, *, channels_last, training, **options):
    """`run` by torch's own operators, between torch's rules and ours; channels_last None leaves y's format to them."""
    # torch's norm wants its four tensors in one dtype, and keeps the statistics it was handed for backward: it gets
    # copies, as the buffers may change in between (DDP rewrites them before each forward)
    wide = torch.promote_types(x.dtype, torch.float32)
    bn_weight, bn_bias = (None if p is None else p.to(wide) for p in (bn_weight, bn_bias))
    mean, var = (None if buffer is None else buffer.to(wide, copy=True) for buffer in (running_mean, running_var))
    y = to_format(run(x, weight, bn_weight, bn_bias, mean, var, training=training, **options), channels_last)
    if training and mean is not None and var is not None:
        _values(running_mean).copy_(mean.detach())
        _values(running_var).copy_(var.detach())
    return y


def _reference(x, weight, bn_weight, bn_bias, running_mean, running_var, *, bias, residuals, spec, training, momentum):
    if spec.shortcut_channels:
        residuals = (*residuals, spec.shortcut(x))
    return reference.conv_bn_act(
        x, weight, bn_weight, bn_bias, running_mean, running_var,
        bias=bias, residual=residuals, residual_at="post_norm" if spec.post_norm else "pre_norm",
        branch_scale=spec.branch_scale, stride=spec.stride, padding=spec.padding, dilation=spec.dilation,
        groups=spec.groups, training=training, momentum=momentum, eps=spec.eps,
        activation="relu" if spec.relu else None,
    )  # fmt: skip


def _values(statistics):
    """To be written to without a new version, as torch's norm does it: others may keep them for their backward.

    Not by no_grad, a region of its own in an exported graph, which torch.export.save refuses. Compilers, tracers and
    transforms refuse `data`, or take it for a constant.
    """
    return statistics.data if plainly_eager() else statistics.detach()


def _update_running(running_mean, running_var, mean, var, momentum, count):
    # as torch does it, in fp32, rounded once to the buffers' dtype; both at a time, since every launch counts beside a
    # small layer. A plan's kernel (triton.batchnorm) fuses product and sum: an ulp apart at times
    running = [_values(running_mean), _values(running_var)]
    batch = torch._foreach_mul([mean.detach(), var.detach()], [momentum, momentum * count / (count - 1)])
    if mean.dtype == running_mean.dtype == running_var.dtype:
        torch._foreach_mul_(running, 1 - momentum)
        torch._foreach_add_(running, batch)
    else:
        updated = [buffer.float() * (1 - momentum) + share for buffer, share in zip(running, batch, strict=True)]
        for buffer, value in zip(running, updated, strict=True):
            buffer.copy_(value)


def _autocast(x, weight, bias, residuals):
    """Within autocast the convolution's inputs take its dtype, as torch's conv2d does; the norm's tensors stay.

    Without a convolution x is one of the norm's tensors, and its dtype is the residuals'.
    """
    dtype = autocast_dtype(x.device) if isinstance(x, torch.Tensor) else None
    if dtype is None:
        return x, weight, bias, residuals
    if weight is None:
        dtype = x.dtype

    def cast(tensor):
        eligible = isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(x), cast(weight), cast(bias), tuple(cast(residual) for residual in residuals)
