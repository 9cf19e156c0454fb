"""Checks a call's arguments before any work, so that nothing below `functional` raises for a user's mistake.

The checks raise TypeError for dtypes, ValueError for shapes and values, RuntimeError for devices and missing
statistics, as torch does. Constructor arguments are checked in `arguments`.
"""

import numbers

import torch

from ..common.arguments import (
    check_eps,
)
from ..common.call import Call
from ..common.devices import device_kind
from ..common.streams import check_image
from ..common.tracing import not_traced

# fp8 and complex are floating too, but no implementation computes in them
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_call(call: Call, *, shared: bool = False) -> None:
    """Checks the tensors of one call, already cast to the dtype they are convolved in.

    Without a weight the spec must have no convolution options. shared: the batch is a part of a larger one, as with
    synchronized statistics.
    """
    x, weight, bias, bn_weight, bn_bias, residuals, running_mean, running_var, _, spec, training, momentum = call
    convolved = {"x": x, "weight": weight, "bias": bias}
    convolved = {name: t for name, t in convolved.items() if name == "x" or t is not None}
    convolved |= {f"residual[{i}]" if len(residuals) > 1 else "residual": r for i, r in enumerate(residuals)}
    normed = {"bn_weight": bn_weight, "bn_bias": bn_bias, "running_mean": running_mean, "running_var": running_var}
    normed = {name: t for name, t in normed.items() if t is not None}

    _check_types(convolved | normed)
    _check_dtypes(convolved, autocast=False)  # its casts are already done
    _check_norm_dtypes(x.dtype, normed)
    _check_devices(convolved | normed)
    check_eps(spec.eps)  # again: a module's eps is an attribute of its norm, which may have changed
    _check_conv_shapes(x, weight, bias, spec)
    output = spec.output_shape(x, weight)
    for name, tensor in normed.items():
        if tensor.shape != (output[1],):
            raise ValueError(
                f"{name} must have the shape ({output[1]},), one value per output channel, got {_shape(tensor)}"
            )
    if min(output[2:]) < 1:
        kernel = () if weight is None else tuple(weight.shape[2:])
        raise ValueError(
            f"the output would be {output[2]} x {output[3]} pixels: x {_shape(x)} is smaller than the kernel "
            f"{kernel} with padding {spec.padding} and dilation {spec.dilation}"
        )
    _check_residuals(residuals, output)
    _check_statistics(running_mean, running_var, training, momentum)
    if training and not shared and output[0] * output[2] * output[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {output}")


def check_packed(x, channels):
    """Checks x before it is sliced, as `check_call` would later."""
    _check_types({"x": x})
    check_image("x", x, channels)


def check_projected(x, channels, weight):
    """Checks x before a separate module projects its residual stream, as `check_call` would later."""
    check_packed(x, channels)
    tensors = {"x": x, "weight": weight}
    _check_dtypes(tensors, autocast=autocast_dtype(x.device) is not None)
    _check_devices(tensors)


def check_streams(r, t):
    """Checks two streams before they are joined; None is an absent one. `as_streams` checks the shapes."""
    streams = {name: stream for name, stream in (("r", r), ("t", t)) if stream is not None}
    _check_types(streams)
    _check_devices(streams)
    if streams:
        _check_dtypes(streams, autocast=autocast_dtype(next(iter(streams.values())).device) is not None)


def as_residuals(residual) -> tuple:
    """Turns None, a tensor or a tuple of tensors into a tuple of tensors, which `check_call` checks."""
    if residual is None:
        return ()
    if not isinstance(residual, (torch.Tensor, tuple, list)):
        raise TypeError(f"residual must be a torch.Tensor or a tuple of two, got {type(residual).__name__}")
    return (residual,) if isinstance(residual, torch.Tensor) else tuple(residual)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast currently gives convolutions on this device, None outside autocast."""
    kind = device_kind(device)
    # checked first: for "meta" and others, which have no autocast, the next call raises
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


@not_traced  # the compiler of torch 2.11 cannot trace it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _check_types(tensors):
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def _check_dtypes(tensors, *, autocast):
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {dtype}: cast it with .to(dtype)"
            )
    if len(set(dtypes.values())) > 1 and not autocast:
        raise TypeError(f"{', '.join(dtypes)} must share a dtype outside autocast, got {_listed(dtypes)}")


def _check_norm_dtypes(dtype, normed):
    allowed = {dtype, torch.float32} if dtype.itemsize == 2 else {dtype}
    for name, tensor in normed.items():
        if tensor.dtype not in allowed:
            raise TypeError(
                f"{name} must be {' or '.join(sorted(map(str, allowed)))} beside x in {dtype}, got {tensor.dtype}"
            )


def _check_devices(tensors):
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {_listed(devices)}: move them with .to(device)")


def _check_conv_shapes(x, weight, bias, spec):
    tensors = {"x": x} if weight is None else {"x": x, "weight": weight}
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            layout = "(C_out, C_in/groups, kh, kw)" if name == "weight" else "(N, C_in, H, W)"
            raise ValueError(f"{name} must have four dimensions {layout}, got the shape {_shape(tensor)}")
    for name, tensor in tensors.items():
        if 0 in (tensor.shape[1:] if name == "x" else tensor.shape):  # an empty batch is fine
            raise ValueError(f"{name} must have no empty dimension, got {_shape(tensor)}")
    if weight is None:
        if bias is not None or spec.has_conv_options:
            raise ValueError(f"without a weight there is nothing for a bias or a convolution's options, got {spec}")
        return
    c_out, c_group = weight.shape[:2]
    if c_out % spec.groups:
        raise ValueError(f"weight {_shape(weight)}: its {c_out} output channels must divide into groups={spec.groups}")
    if x.shape[1] != c_group * spec.groups:
        raise ValueError(
            f"x has {x.shape[1]} channels, but weight {_shape(weight)} with groups={spec.groups} takes "
            f"{c_group * spec.groups}"
        )
    if bias is not None and bias.shape != (c_out,):
        raise ValueError(f"bias must have the shape ({c_out},), one value per output channel, got {_shape(bias)}")


def _check_residuals(residuals, output):
    if len(residuals) > 2:
        raise ValueError(
            f"residual must be a tensor or a tuple of at most two, got {len(residuals)}: add some up first"
        )
    n, c_out, h, w = output
    for residual in residuals:
        fits = residual.dim() == 4 and residual.shape[0] == n and residual.shape[2:] == (h, w)
        if not fits or residual.shape[1] > c_out:
            raise ValueError(
                f"residual must have the shape ({n}, C_res, {h}, {w}) and C_res <= {c_out}, got {_shape(residual)}"
            )


def _check_statistics(running_mean, running_var, training, momentum):
    if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
        raise TypeError(
            f"momentum must be a number, got {momentum!r}: the cumulative average (None) is kept by the modules, "
            "which count the batches"
        )
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if not training and statistic is None:
            raise RuntimeError(f"{name} must be defined in evaluation mode: pass both statistics, or training=True")
        if training and statistic is not None and statistic.stride(0) == 0 and statistic.numel() > 1:
            raise ValueError(
                f"{name} is updated in training, and its channels share memory (stride 0): pass {name}.contiguous()"
            )
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")


def _shape(tensor):
    return tuple(tensor.shape)


def _listed(by_name):
    return ", ".join(f"{name} {value}" for name, value in by_name.items())
