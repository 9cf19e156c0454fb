"""The quantized twins of RiRLayer, ConvBNAct, Conv2d and Linear.

Each is its parent with the convolution left to a `quantizer` (formulas in `codes` and `quantizer`); what follows stays
floating point: shortcuts, which carry the activations as they are, norm and ReLU, by
`rir_kernels.dispatch.bn_state.norm_act`.
Parameters and keys are the parent's; new are the buffers quantizer.bound and quantizer.batches. An integer network
(`integer`) consists of the same classes with another `quantizer`, so that all that follows is the same by construction.
"""

import dataclasses

import torch
from torch import nn

import rir_kernels as rir
from rir_kernels.common.spec import ConvBNActSpec, spec_of_conv
from rir_kernels.common.stream_views import join, split
from rir_kernels.common.streams import PACKED, as_streams
from rir_kernels.dispatch import bn_state
from rir_kernels.dispatch.tensors import as_residuals, check_packed, check_streams

from .quantizer import Quantizer


class Quantized:
    """Mixin of the twins: class QuantizedX(Quantized, X), whose constructor takes X's arguments and the quantizer's.

    `quantizer` is called in place of the convolution.
    """

    quantizer: nn.Module

    def __init__(self, *args, weight_bits=4, activation_bits=4, signed=False, start_step=0, **options):
        super().__init__(*args, **options)
        self._attach(weight_bits, activation_bits, signed=signed, start_step=start_step)

    def _attach(self, weight_bits, activation_bits, **options):
        weight = weight_owner(self).weight
        # a bound is a statistic, and no less than fp32 beside half weights
        factory = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.quantizer = Quantizer(weight_bits, activation_bits, **options, **factory).train(self.training)
        if isinstance(self, rir.RiRLayer) and self.projection is not None:
            become(self.projection, weight_bits, activation_bits, **options)


class QuantizedRiRLayer(Quantized, rir.RiRLayer):
    """forward as RiRLayer's. A 1x1 `projection` becomes a QuantizedConv2d of the same bits."""

    def forward(self, x, t=PACKED, *, outer=None):
        packed = t is PACKED
        if not packed:
            check_streams(x, t)
            x = join(*as_streams(x, t, self.in_residual, self.in_channels))
        check_packed(x, self.in_channels)
        spec = self._spec()
        z = self.quantizer(x, self.weight, spec)
        residuals = []
        if self.projection is not None:
            residuals.append(self.projection(split(x, self.in_residual)[0]))
        elif spec.shortcut_channels:
            residuals.append(spec.shortcut(x))
        if outer is not None:
            residuals.append(outer)
        y = bn_state.norm_act(self.bn, z, spec=_without_conv(spec), residuals=tuple(residuals), impl=self.impl)
        return y if packed else split(y, self.out_residual)


class QuantizedConvBNAct(Quantized, rir.ConvBNAct):
    """forward as ConvBNAct's; `conv` holds the parameters and the geometry, and is not called there either."""

    def forward(self, x, residual=None):
        spec = spec_of_conv(self.conv, self.residual_at, self.branch_scale, self.activation, self.bn.eps)
        z = _with_bias(self.quantizer(x, self.conv.weight, spec), self.conv.bias)
        return bn_state.norm_act(self.bn, z, spec=_without_conv(spec), residuals=as_residuals(residual), impl=self.impl)


class QuantizedConv2d(Quantized, nn.Conv2d):
    """forward as Conv2d's with zero padding: the projections of shortcuts."""

    def forward(self, x):
        spec = spec_of_conv(self, "pre_norm", 1.0, None, 0.0)
        return _with_bias(self.quantizer(x, self.weight, spec), self.bias)


class QuantizedLinear(Quantized, nn.Linear):
    """forward as Linear's: (..., in_features) -> (..., out_features)."""

    def forward(self, x):
        weight = self.weight.reshape(*self.weight.shape, 1, 1)
        pixels = x.reshape(-1, self.in_features, 1, 1)
        z = _with_bias(self.quantizer(pixels, weight, ConvBNActSpec()), self.bias)
        return z.reshape(*x.shape[:-1], self.out_features)


TWINS = {
    rir.RiRLayer: QuantizedRiRLayer,
    rir.ConvBNAct: QuantizedConvBNAct,
    nn.Conv2d: QuantizedConv2d,
    nn.Linear: QuantizedLinear,
}


def become(module: nn.Module, weight_bits, activation_bits, *, signed, start_step=0) -> None:
    """Make `module`, whose type is exactly a key of TWINS, its quantized twin in place."""
    module.__class__ = TWINS[type(module)]
    module._attach(weight_bits, activation_bits, signed=signed, start_step=start_step)


def weight_owner(module: nn.Module) -> nn.Module:
    """The module that has the weight: a ConvBNAct's is its `conv`'s."""
    return module.conv if isinstance(module, rir.ConvBNAct) else module


def _with_bias(z, bias):
    return z if bias is None else z + bias.to(z.dtype).view(-1, 1, 1)


def _without_conv(spec):
    """The spec of what follows the convolution."""
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "shortcut_channels": 0}
    return dataclasses.replace(spec, **geometry)
