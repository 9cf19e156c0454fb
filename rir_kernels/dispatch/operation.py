"""One call from its arguments to its result: cast, find the plan, check, choose, run."""

import dataclasses
from collections.abc import Callable

import torch

from ..autograd.runners import RegisteredOp
from ..backends import aten
from ..backends.composed import Composed
from ..common.activations import activate, by_sign
from ..common.arguments import OUR_KERNELS
from ..common.call import Call
from ..common.memory_format import conv_format, is_channels_last, to_format, warn_of_copies
from ..distributed import sync_statistics
from . import calls, plan_cache
from .choose import resolve
from .preference import check_impl
from .tensors import FLOATS, autocast_dtype, check_call


def apply(
    call: Call,
    impl: str,
    *,
    process_group=None,
    torch_format: bool = False,
    otherwise: Callable[[Exception], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Returns y of the call, and updates its buffers once it has succeeded.

    call.spec may name a shortcut from x itself; without a weight it has neither convolution options nor a shortcut.

    Args:
        process_group: its ranks share the batch's statistics, in training; None: this rank only.
        torch_format: y has the memory format that torch's own convolution returns (channels_last if x or weight is)
            rather than x's.
        otherwise: computes y if the call is refused for its tensors or numbers: it is called with the error, which is
            then not raised.
    """
    if _within_autocast():
        call = autocast(call)
    signature = plan_cache.signature(call, impl, torch_format)
    if signature is not None and (runner := plan_cache.find(signature, process_group)) is not None:
        if calls.recorders:
            calls.ran(call, asked=runner.impl, meant=runner.impl, impl=runner.impl)
        return runner(call)

    check_impl(impl)
    try:
        check_call(call, shared=process_group is not None)
    except (TypeError, ValueError, RuntimeError) as error:
        if otherwise is None:
            raise
        return otherwise(error)
    residuals = tuple(residual for residual in call.residuals if residual.shape[1] > 0)
    if len(residuals) != len(call.residuals):
        signature = None
    # torch's norm does not accept numpy's numbers
    call = call.having(residuals=residuals, momentum=float(call.momentum))

    asked, impl = impl, resolve(impl, call.x, call.weight, call.spec, call.training)
    channels_last = conv_format(call.x, call.weight) if torch_format else is_channels_last(call.x)
    by_kernels = impl in OUR_KERNELS
    launches = by_kernels and call.x.shape[0] > 0
    if launches and not channels_last:
        warn_of_copies(call.x)
    if impl == "triton" and call.weight is None and _joins_before_the_norm(call):
        x = to_format(aten.joined(call.x, residuals, call.spec), channels_last)
        spec = dataclasses.replace(call.spec, branch_scale=1.0)
        return apply(call.having(x=x, residuals=(), spec=spec), impl, process_group=process_group)
    if by_kernels and not (by_sign(call.spec.activation) or call.derivative_from_z()) and call.needs_grad():
        # the derivative needs the sum after the norm: torch's own function of it keeps it
        spec = dataclasses.replace(call.spec, activation=None)
        y = apply(call.having(spec=spec), impl, process_group=process_group, torch_format=torch_format)
        return activate(y, call.spec.activation)
    by = impl if launches or (impl == "reference" and process_group is None) else "torch"
    if calls.on():
        calls.ran(call, asked=asked, meant=impl, impl=by)

    if process_group is not None:
        if launches:
            given, call = call, call.with_dense_vectors()
            signature = signature if call is given else None
        return sync_statistics.run(process_group, call, by, by_kernels, channels_last, signature)
    if not launches:
        runner = Composed(by, None if torch_format else channels_last)
    else:
        runner = None
        if impl == "triton" and signature is not None:
            runner = plan_cache.plan(signature, call, channels_last)
        runner = runner or RegisteredOp(impl, channels_last)
    return runner(call)


# older releases of torch cannot answer this for all devices at once
_within_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def _joins_before_the_norm(call):
    return not call.spec.post_norm and (len(call.residuals) > 0 or call.spec.branch_scale != 1.0)


def autocast(call: Call) -> Call:
    """Within autocast, casts the convolution's inputs to its dtype, as torch's conv2d does; the norm's tensors stay.

    Without a convolution x is one of the norm's tensors, and residuals are cast to its dtype.
    """
    dtype = autocast_dtype(call.x.device) if isinstance(call.x, torch.Tensor) else None
    if dtype is None:
        return call
    if call.weight is None:
        dtype = call.x.dtype

    def cast(tensor):
        eligible = isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return call.having(
        x=cast(call.x), weight=cast(call.weight), bias=cast(call.bias), residuals=tuple(map(cast, call.residuals))
    )
