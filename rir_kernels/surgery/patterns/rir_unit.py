"""pytorchcv's RiRUnit (pytorchcv.models.rir_cifar, seen in 0.0.74): P4.

    r' = PA_r(res_pass(r) + trans_cross(t) + identity(r)),  t' = PA_t(trans_pass(t) + res_cross(r)),  PA = ReLU(BN(.))

where the identity is a 1x1 convolution if the unit's shape changes. pytorchcv is not imported here: an instance of its
class can only be there if it has been.
"""

import sys

from torch import nn

from ...joining import join
from ..guards import bypass_obstacle, call_obstacle
from ..swap import Fused
from . import four_convs
from .base import Family, Match, Refusal
from .four_convs import Layer

_CONVS = ("res_pass_conv", "res_cross_conv", "trans_cross_conv", "trans_pass_conv")  # rr, rt, tr, tt
_ACTIVATIONS = ("res_postactiv", "trans_postactiv")


class FusedRiRUnit(Fused):
    def forward(self, x_res, x_trans):
        if (
            call_obstacle(x_res, x_trans)
            or _obstacle(self)
            or not _fit(self, x_res, x_trans)
            or not four_convs.counts_agree(layer := _layer(self))
        ):
            return super().forward(x_res, x_trans)

        channels = self.res_pass_conv.weight.shape[0]
        y = four_convs.run(
            layer,
            join(x_res, x_trans),
            residuals=(self.identity_conv(x_res),) if self.resize_identity else (),
            shortcut_channels=0 if self.resize_identity else channels,
            impl=self._rir_fusion.impl,
        )
        return y[:, :channels], y[:, channels:]


def _find(unit):
    parts = (*_CONVS, *_ACTIVATIONS)
    reason = _obstacle(unit)
    return [Refusal(reason, parts) if reason else Match("P4", parts)]


def _library():
    return sys.modules.get("pytorchcv.models.rir_cifar")


def _layer(unit):
    return Layer(
        {name: getattr(unit, name) for name in _CONVS},
        {f"{name}.bn": getattr(unit, name).bn for name in _ACTIVATIONS},
    )


def _obstacle(unit):
    for name in _ACTIVATIONS:  # before anything is read from inside
        activation = getattr(unit, name)
        if reason := bypass_obstacle(activation, _library().PostActivation):
            return f"{name}: {reason}"
        if reason := bypass_obstacle(activation.activ, nn.ReLU):
            return f"{name}.activ: {reason}"
    layer = _layer(unit)
    if None in layer.convs.values() or None in layer.norms.values():
        return "a convolution or a norm is missing"
    if reason := four_convs.obstacle(layer):
        return reason
    outputs, inputs = unit.res_pass_conv.weight.shape[:2]
    if reason := four_convs.misfit(layer, (inputs, inputs), (outputs, outputs)):
        return reason
    if unit.resize_identity:
        conv = unit.identity_conv  # called as it is, so it may have hooks and parametrizations
        if not isinstance(conv, nn.Conv2d) or conv.out_channels != outputs:
            return "identity_conv: not a Conv2d to the residual stream"
    elif inputs != outputs or not four_convs.keeps_size(layer, 1):
        return "the shortcut does not have the convolutions' output shape"
    return ""


def _fit(unit, r, t):
    # what else the four convolutions can be called with (broadcasting, unlike dtypes) is left to them
    channels = unit.res_pass_conv.weight.shape[1]
    same = r.shape == t.shape and r.dtype == t.dtype and r.device == t.device
    return same and r.dim() == 4 and r.shape[1] == channels


FAMILY = Family(target=lambda: getattr(_library(), "RiRUnit", None), find=_find, mixin=FusedRiRUnit)
