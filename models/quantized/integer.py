"""Inference in integers: a copy of a quantized model whose convolutions add integers in int32.

    acc = conv(q_x, q_w) in int32        z = acc / (s_x s_w), norm, shortcuts and ReLU as in `layers`

q_w is stored (int8, or two codes of up to 4 bits in a byte), q_x computed from the float activations as in `quantizer`.
Both networks have the same accumulators, and all that follows is the same code on the same numbers: their activations
and outputs agree to the last bit.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels.common.memory_format import is_channels_last, to_format
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.dispatch.tensors import check_projected

from . import exact
from .codes import to_codes, weight_scale
from .layers import weight_owner
from .quantizer import Quantizer, rescale, without_autocast


class IntegerQuantizer(nn.Module):
    """forward(x, weight, spec) as Quantizer's, in evaluation mode alone: it has the weight's codes itself, and takes
    from `weight` no more than dtype and device.

    Buffers: codes (int8 in the weight's shape, or uint8, flat, two to a byte up to 4 bits), x_scale 0-dim, w_scale
    (C_out,).
    RuntimeError in training mode; ValueError where x holds NaN, for which there is no code.
    """

    def __init__(self, quantizer: Quantizer, weight: torch.Tensor):
        super().__init__()
        self.activation_bits, self.weight_bits = quantizer.activation_bits, quantizer.weight_bits
        self.signed = quantizer.signed
        self.shape = (*weight.shape, 1, 1)[:4]  # a Linear is a 1x1 convolution
        self.largest_sum = quantizer.largest_sum(self.shape)
        wide = torch.promote_types(weight.dtype, torch.float32)
        w_scale = weight_scale(weight.to(wide), self.weight_bits)
        codes = to_codes(weight.detach().to(wide), w_scale, self.weight_bits, signed=True).to(torch.int8)
        self.register_buffer("codes", pack(codes) if self.weight_bits <= 4 else codes)
        self.register_buffer("x_scale", quantizer.scale(wide))
        self.register_buffer("w_scale", w_scale)
        self.eval()

    def forward(self, x, weight, spec: ConvBNActSpec):
        if self.training:
            raise RuntimeError("an integer network cannot be trained: train the quantized one, or call .eval()")
        check_projected(x, self.shape[1] * spec.groups, weight)
        with without_autocast(x) as dtype:
            wide = torch.promote_types(x.dtype, torch.float32)
            codes = to_codes(x.to(wide), self.x_scale, self.activation_bits, signed=self.signed)
            if codes.isnan().any():
                raise ValueError("x holds NaN, for which there is no integer code: the quantized network takes it")
            codes = codes.to(torch.int8 if self.signed else torch.uint8)
            acc = exact.convolve_integers(codes, self.weight_codes(), spec)
            z = rescale(acc.to(exact.accumulator_dtype(self.largest_sum, wide)), self.x_scale, self.w_scale)
        return to_format(z.to(dtype), is_channels_last(x))

    def weight_codes(self) -> torch.Tensor:
        """The codes of the weight (C_out, C_in/groups, kh, kw) in int8."""
        return unpack(self.codes, self.shape) if self.weight_bits <= 4 else self.codes.view(self.shape)

    def extra_repr(self):
        sign = "signed" if self.signed else "unsigned"
        return f"weight_bits={self.weight_bits}, activation_bits={self.activation_bits}, {sign}"


def integer(model: nn.Module) -> nn.Module:
    """An independent copy of a quantized model for inference, in integers; nothing in it wants a gradient.

    RuntimeError where a part of the model is in training mode, or its activations are not quantized yet. ValueError
    where nothing is quantized, bits are None, a weight or a bound is not finite, or int32 could overflow.
    """
    quantized = [(name, m) for name, m in model.named_modules() if isinstance(getattr(m, "quantizer", None), Quantizer)]
    if not quantized:
        raise ValueError(f"{type(model).__name__} has no quantized layers: call quantize_ and train it first")
    for name, module in model.named_modules():
        if module.training:
            raise RuntimeError(f"{name or 'the model'} is in training mode: call .eval() first")
    for name, module in quantized:
        _check(name or "the model", module.quantizer, weight_owner(module).weight)
    result = copy.deepcopy(model).requires_grad_(False)
    for module in result.modules():
        if isinstance(getattr(module, "quantizer", None), Quantizer):
            owner = weight_owner(module)
            module.quantizer = IntegerQuantizer(module.quantizer, owner.weight)
            # blocks ask their projections for the dtype
            empty = owner.weight.detach().new_empty(0)
            del owner.weight
            owner.register_buffer("weight", empty, persistent=False)
    return result


def _check(name, quantizer, weight):
    if quantizer.weight_bits is None or quantizer.activation_bits is None:
        raise ValueError(f"{name} is float on one side ({quantizer.extra_repr()}): integers need bits on both")
    if not quantizer.is_quantizing():
        raise RuntimeError(
            f"{name} has seen {int(quantizer.batches)} batches, and quantizes its activations after "
            f"{quantizer.start_step + 1}: train it, so that the bounds are known"
        )
    if not (weight.isfinite().all() and quantizer.bound.isfinite()):
        raise ValueError(f"{name} has a weight or an activation bound that is not finite: there are no codes for it")
    if quantizer.largest_sum(weight.shape) >= 2**31:
        raise ValueError(
            f"{name}: its sums may exceed int32, up to {quantizer.largest_sum(weight.shape)}: use fewer bits"
        )


def pack(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes within [-8, 7] -> uint8, flat, two to a byte: the first in the low half."""
    flat = codes.flatten()
    low, high = F.pad(flat, (0, flat.numel() % 2)).view(torch.uint8).unflatten(0, (-1, 2)).unbind(1)
    return (low & 15) | (high << 4)


def unpack(packed: torch.Tensor, shape) -> torch.Tensor:
    """The reverse: int8 of that shape."""
    halves = torch.stack([packed & 15, packed >> 4], 1).flatten()[: torch.Size(shape).numel()].view(torch.int8)
    return torch.where(halves > 7, halves - 16, halves).view(shape)
