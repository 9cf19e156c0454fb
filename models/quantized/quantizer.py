"""What stands in for a convolution in a quantized layer: codes, an exact convolution of them, one rescaling.

    z = acc / (s_x s_w)        acc = conv(q_x, q_w), an integer; s_w per output channel

The formulas of codes and scales are in `codes`. Activations stay float for the first `start_step` batches of training,
in which their bound is already observed; a side whose bits are None stays float for ever. With a side that is float
the convolution is the vendor's.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels.common.memory_format import is_channels_last, to_format
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.dispatch.tensors import autocast_dtype, check_projected

from . import exact
from .codes import check_bits, code_range, next_bound, scale_of, to_codes, weight_scale


class Quantizer(nn.Module):
    """forward(x, weight, spec): x (N, C_in, H, W), weight (C_out, C_in/groups, kh, kw) -> z (N, C_out, H', W').

    z has x's dtype (autocast's, within autocast) and memory format; codes, accumulators and scales are fp32 or fp64
    whatever that is. signed: x may be negative; where it is not signed, what is negative becomes zero.

    Buffers: bound (the running mean b), batches (how many it has seen). They change in training mode alone.
    """

    def __init__(self, weight_bits=4, activation_bits=4, *, signed=False, start_step=0, device=None, dtype=None):
        super().__init__()
        check_bits("weight_bits", weight_bits)
        check_bits("activation_bits", activation_bits)
        if not isinstance(start_step, int) or isinstance(start_step, bool) or start_step < 0:
            raise ValueError(f"start_step must be an int >= 0, a number of batches, got {start_step!r}")
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.signed = signed
        self.start_step = start_step
        self.register_buffer("bound", torch.zeros((), device=device, dtype=dtype))
        self.register_buffer("batches", torch.zeros((), device=device, dtype=torch.int64))
        self._started = False  # for good: spares a GPU the wait at every call

    def forward(self, x, weight, spec: ConvBNActSpec):
        check_projected(x, weight.shape[1] * spec.groups, weight)
        with without_autocast(x) as dtype:
            wide = torch.promote_types(x.dtype, torch.float32)
            x_wide, w_codes, w_scale = x.to(wide), weight.to(wide), None
            if self.activation_bits is not None and self.training and x.numel():
                self._observe(x_wide)
            x_codes, x_scale = x_wide, None
            if self.is_quantizing():
                x_scale = self.scale(wide)
                x_codes = to_codes(x_wide, x_scale, self.activation_bits, signed=self.signed)
            if self.weight_bits is not None:
                w_scale = weight_scale(w_codes, self.weight_bits)
                w_codes = to_codes(w_codes, w_scale, self.weight_bits, signed=True)
            if x_scale is None or w_scale is None:
                acc = F.conv2d(x_codes, w_codes, None, spec.stride, spec.padding, spec.dilation, spec.groups)
            else:
                acc = exact.convolve(x_codes, w_codes, spec, self.largest_sum(weight.shape))
            z = rescale(acc, x_scale, w_scale)
        return to_format(z.to(dtype), is_channels_last(x))

    def is_quantizing(self) -> bool:
        """Whether activations are quantized by now: more than `start_step` batches have been seen."""
        if self.activation_bits is not None and not self._started:
            self._started = bool(self.batches > self.start_step)
        return self._started

    def scale(self, dtype) -> torch.Tensor:
        """s_x, 0-dim."""
        return scale_of(self.bound.to(dtype), self.activation_bits, self.signed)

    def largest_sum(self, weight_shape) -> int:
        """What |acc| cannot exceed."""
        x_high, w_high = code_range(self.activation_bits, self.signed)[1], code_range(self.weight_bits, True)[1]
        return exact.largest_sum(weight_shape, x_high, w_high)

    def _observe(self, x):
        self.bound.copy_(next_bound(self.bound, x, signed=self.signed, first=self.batches == 0))
        self.batches.add_(1)

    def _load_from_state_dict(self, *args, **kwargs):
        self._started = False  # the counter may be another's
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self):
        sign = "signed" if self.signed else "unsigned"
        return f"weight_bits={self.weight_bits}, activation_bits={self.activation_bits}, {sign}"


def rescale(acc, x_scale, w_scale):
    """z = acc / (s_x s_w) in acc's dtype; x_scale 0-dim, w_scale (C_out,), None where that side is float."""
    if x_scale is None and w_scale is None:
        return acc
    scale = w_scale if x_scale is None else x_scale if w_scale is None else x_scale * w_scale
    return acc * scale.reciprocal().view(-1, 1, 1)


@contextlib.contextmanager
def without_autocast(x):
    """Autocast would round codes and sums to 16 bits; gives the dtype that the result shall have."""
    dtype = autocast_dtype(x.device)
    if dtype is None:
        yield x.dtype
    else:
        with torch.autocast(x.device.type, enabled=False):
            yield x.dtype if x.dtype == torch.float64 else dtype
