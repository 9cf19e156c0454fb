"""Numbers as integer codes q of p bits and a scale s, so that q / s stands for the number.

    weights, per output channel    s = (2^(p-1) - 1) / max|w|    q = clip(floor(w s + 1/2), -(2^(p-1) - 1), 2^(p-1) - 1)
    activations after a ReLU       s = 2^p / b                   q = clip(floor(x s), 0, 2^p - 1)
    activations of either sign     s = (2^(p-1) - 1) / b         q as the weights'

b is a running mean of the largest |x| of each batch: the first batch's, then b + 0.1 (max|x| - b). A bound of zero
(nothing but zeros was seen) counts as one. NaN stays NaN, in bounds, scales and codes.

Gradients are straight-through: floor lets them pass, and so does clip wherever it changed nothing; the scale is a
constant.

Source: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", arXiv 2105.03536, and its library AQT.
"""

import torch

MOMENTUM = 0.1  # of the running mean
MIN_BITS, MAX_BITS = 2, 8


def check_bits(name: str, bits) -> None:
    """ValueError unless `bits` is an int from 2 to 8, or None for no quantization."""
    if bits is None:
        return
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(
            f"{name} must be an int from {MIN_BITS} to {MAX_BITS}, or None to leave it float, got {bits!r}"
        )


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The least and the largest code."""
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return -high if signed else 0, high


def scale_of(bound: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """s for each bound, in the bounds' shape and dtype (fp32 or fp64)."""
    # below this the scale would overflow, or come near it: to the codes such a number is zero
    negligible = torch.finfo(bound.dtype).tiny * 2**16
    bound = torch.where(bound <= negligible, 1.0, bound)
    levels = code_range(bits, signed)[1] if signed else 2**bits
    return torch.full_like(bound, levels) / bound  # number / tensor would round twice: it multiplies by the reciprocal


def weight_scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """s (C_out,) of a weight (C_out, ...), without gradient."""
    return scale_of(weight.detach().flatten(1).abs().amax(1), bits, signed=True)


def next_bound(bound: torch.Tensor, x: torch.Tensor, *, signed: bool, first: torch.Tensor) -> torch.Tensor:
    """b after the batch x, without gradient, in b's dtype; `first` (bool, 0-dim): no batch came before."""
    x = x.detach()
    largest = (x.abs() if signed else x).amax().to(bound.dtype)
    return torch.where(first, largest, bound + MOMENTUM * (largest - bound))


def to_codes(x: torch.Tensor, scale: torch.Tensor, bits: int, *, signed: bool) -> torch.Tensor:
    """q of x, integers in x's shape and dtype (fp32 or fp64), with straight-through gradients to x.

    scale: 0-dim, or (C_out,) where x is (C_out, ...).
    """
    scaled = x * scale.view(-1, *[1] * (x.dim() - 1)) if scale.dim() else x * scale
    return _FloorAndClip.apply(scaled, 0.5 if signed else 0.0, *code_range(bits, signed))


class _FloorAndClip(torch.autograd.Function):
    """clip(floor(x + offset), low, high); the gradient passes where clip changed nothing."""

    @staticmethod
    def forward(ctx, x, offset, low, high):
        floored = (x + offset).floor()
        codes = floored.clamp(low, high)
        ctx.save_for_backward(codes == floored)
        return codes

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0.0), None, None, None
