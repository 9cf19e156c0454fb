"""The one operation: convolution, batch norm, residual, activation.

    z = branch_scale * (conv(x, W) + bias) + [residual | 0]     residual_at="pre_norm": RiR, the norm sees the sum
    y = act(norm(z))

    y = act(branch_scale * norm(conv(x, W) + bias) + [residual | 0])     residual_at="post_norm": an ordinary ResNet

The norm uses the batch's statistics in training and the running ones otherwise. `norm_act` has no convolution.
"""

import torch

from .common.arguments import named_from, unplaced
from .common.call import Call
from .dispatch.operation import apply
from .dispatch.options import build_spec
from .dispatch.tensors import as_residuals


@named_from(2)
def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    residual_at: str | None = None,
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
        bn_weight, bn_bias, running_mean, running_var: (C_out,) or None; x's dtype, or fp32 with half activations.
            The statistics are updated in place when training, exactly as torch.nn.functional.batch_norm does.
        bias: (C_out,), added to the convolution's output.
        residual: (N, C_res, H', W') with C_res <= C_out, or a tuple of two such, added to the first C_res channels.
        residual_at: "pre_norm" or "post_norm"; required with a residual or a branch_scale.
        branch_scale: multiplies what the residual is added to, never the residual.
        activation: "relu" or None.
        impl: "auto", "reference", "torch", "hybrid" or "triton"; a name other than "auto" never falls back.

    Returns: (N, C_out, H', W') in x's dtype (autocast's, within autocast) and memory format.

    Raises, before any work: TypeError for dtypes, ValueError for shapes and values, RuntimeError for devices and
    missing statistics, ImportError and NotImplementedError if the requested implementation cannot run.
    """
    spec = build_spec(residual_at, branch_scale, stride, padding, dilation, groups, eps, activation)
    if weight is None:
        raise TypeError("weight must be a torch.Tensor, got NoneType: norm_act is the operation without a convolution")
    residuals = _placed(residual, residual_at, spec)
    call = Call(
        x, weight, bias, bn_weight, bn_bias, residuals, running_mean, running_var, None, spec, training,
        momentum,
    )  # fmt: skip
    return apply(call, impl)


@named_from(1)
def norm_act(
    x: torch.Tensor,
    *,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    residual: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    residual_at: str | None = None,
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

    Our kernels read x twice in training and once in evaluation, and save only x for backward. A channel slice
    of another tensor is copied first, and torch's operators apply the pre-norm scale and residuals to x.

    Args:
        x: (N, C, H, W), contiguous or channels_last (the kernels' own format; the other one is converted).
        bn_weight, bn_bias, running_mean, running_var: (C,) or None; x's dtype, or fp32 with half activations.
            The statistics are updated in place when training, exactly as torch.nn.functional.batch_norm does.
        residual: (N, C_res, H, W) with C_res <= C, or a tuple of two such, added to the first C_res channels.
        residual_at: "pre_norm" or "post_norm"; required with a residual or a branch_scale.
        branch_scale: multiplies what the residual is added to, never the residual.
        activation: "relu" or None.
        impl: "auto", "reference", "torch", "hybrid" or "triton"; a name other than "auto" never falls back. "hybrid"
            and "triton" are the same here.

    Returns: (N, C, H, W) in x's dtype and memory format. Autocast does not cast x, as with torch's own batch_norm;
    within it residuals are cast to x's dtype.

    Raises, before any work: TypeError for dtypes, ValueError for shapes and values, RuntimeError for devices and
    missing statistics, ImportError and NotImplementedError if the requested implementation cannot run.
    """
    spec = build_spec(residual_at, branch_scale, 1, 0, 1, 1, eps, activation)
    residuals = _placed(residual, residual_at, spec)
    call = Call(
        x, None, None, bn_weight, bn_bias, residuals, running_mean, running_var, None, spec, training,
        momentum,
    )  # fmt: skip
    return apply(call, impl)


def _placed(residual, residual_at, spec):
    """Returns the residuals as a tuple; a residual or a branch_scale without residual_at is an error."""
    residuals = () if residual is None else as_residuals(residual)
    if residual_at is None and (residuals or spec.branch_scale != 1.0):
        raise unplaced(residuals)
    return residuals
