"""pytorchcv's RiRUnit (pytorchcv.models.rir_cifar, as of 0.0.74): conv_add_bn_act.

    r' = PA_r(res_pass(r) + trans_cross(t) + identity(r)),  t' = PA_t(trans_pass(t) + res_cross(r)),  PA = ReLU(BN(.))

where the identity is a 1x1 convolution if the unit's shape changes. This module does not import pytorchcv: an instance
of its class can only exist if pytorchcv has been imported.
"""

import sys

import torch

from ...common.stream_views import join, split
from ...dispatch.tensors import FLOATS
from ..bypass import bypass_obstacle, call_obstacle
from ..class_swap import Fused
from ..classes import Conv2d, ReLU, know
from ..fallback import note
from . import packed_convs
from .base import Family, Fold, Match, Refusal, exactly
from .packed_convs import Layer

_CONVS = ("res_pass_conv", "res_cross_conv", "trans_cross_conv", "trans_pass_conv")  # rr, rt, tr, tt
_ACTIVATIONS = ("res_postactiv", "trans_postactiv")


class FusedRiRUnit(Fused):
    def forward(self, x_res, x_trans):
        asked = call_obstacle(x_res, x_trans)
        reason = asked or _obstacle(self)
        if not reason:
            layer = _layer(self)
            asked = _misfit(layer, x_res, x_trans)
            reason = asked or packed_convs.counts_obstacle(layer)
        if reason:
            note(self, (x_res, x_trans), reason, asked=bool(asked))
            return super().forward(x_res, x_trans)

        channels = layer.outputs[0]
        y = packed_convs.run(
            layer,
            join(x_res, x_trans),
            residuals=(self.identity_conv(x_res),) if self.resize_identity else (),
            shortcut_channels=0 if self.resize_identity else channels,
            impl=self._rir_fusion.impl,
        )
        return split(y, channels)

    def _rir_operations(self):
        return [("conv_add_bn_act", _obstacle(self) or packed_convs.counts_obstacle(_layer(self)))]


def _find(unit):
    parts = (*_CONVS, *_ACTIVATIONS)
    reason = _obstacle(unit)
    return [Refusal(reason, parts) if reason else Match("conv_add_bn_act", parts)]


def _library():
    return sys.modules.get("pytorchcv.models.rir_cifar")


def _obstacle(unit):
    """Returns why the unit's modules cannot be bypassed; `_layer` can read them only after their types are checked."""
    modules, kind = unit._modules, _library().PostActivation
    know(kind)
    for name in _ACTIVATIONS:
        activation = modules.get(name)
        if reason := bypass_obstacle(activation, kind):
            return f"{name}: {reason}"
        if reason := bypass_obstacle(activation._modules.get("activ"), ReLU):
            return f"{name}.activ: {reason}"
    if reason := bypass_obstacle(modules.get(_CONVS[0]), Conv2d):
        return f"{_CONVS[0]}: {reason}"
    layer = _layer(unit)
    if reason := packed_convs.obstacle(layer):
        return reason
    if not unit.resize_identity:
        if layer.inputs != layer.outputs or layer.stride != (1, 1):
            return "the identity does not have the shape of the convolutions' output"
        return ""
    conv = modules.get("identity_conv")  # it is called, so hooks and parametrizations are allowed
    if not isinstance(conv, Conv2d) or conv.out_channels != layer.outputs[0]:
        return "identity_conv: expected a Conv2d with the residual stream's channels"
    return ""


def _layer(unit):
    modules = unit._modules
    first = modules[_CONVS[0]]
    return Layer(
        convs={name: modules.get(name) for name in _CONVS},
        norms={f"{name}.bn": modules[name]._modules.get("bn") for name in _ACTIVATIONS},
        inputs=(first.in_channels, first.in_channels),
        outputs=(first.out_channels, first.out_channels),
        kernel_size=3,
        stride=first.stride,
    )


def _misfit(layer, r, t):
    # leave other inputs that the four convolutions accept (broadcasting, unlike dtypes) to them
    if r.shape != t.shape or r.device != t.device or r.dim() != 4 or r.shape[1] != layer.inputs[0]:
        return "the streams are not two images of its shape"
    dtypes = {r.dtype, t.dtype, *(conv.weight.dtype for conv in layer.convs.values())}
    if (len(dtypes) > 1 or r.dtype not in FLOATS) and not torch.is_autocast_enabled(r.device.type):
        return "its streams and weights are of several dtypes"
    return ""


def _folds(unit):
    return [] if _obstacle(unit) else [Fold(f"{name}.bn") for name in _ACTIVATIONS]


FAMILY = Family(**exactly(lambda: getattr(_library(), "RiRUnit", None)), find=_find, mixin=FusedRiRUnit, folds=_folds)
