"""rir_kernels.reference.ConvBNAct: conv_bn_act or conv_bn, or their variants with a residual if a call passes one."""

from ... import reference
from ...common.spec import spec_of_conv
from ...dispatch import bn_state
from ...dispatch.tensors import as_residuals
from ...reference.functional import check_dtypes
from ..bypass import bypass_obstacle, call_obstacle, conv_obstacle, norm_obstacle, padding_of
from ..class_swap import Fused
from ..classes import Conv2d
from ..fallback import note
from .base import Family, Fold, Match, Refusal, exactly


class FusedConvBNAct(Fused):
    def forward(self, x, residual=None):
        residuals = as_residuals(residual)
        asked = call_obstacle(x, *residuals)
        if reason := asked or _obstacle(self):
            note(self, (x, *residuals), reason, asked=bool(asked))
            return super().forward(x, residual)
        conv, bn = self.conv, self.bn
        check_dtypes(x, conv.weight, conv.bias, *residuals)
        return bn_state.conv_bn_act(
            bn, x, conv.weight, bias=conv.bias, residuals=residuals, impl=self._rir_fusion.impl, torch_format=True,
            spec=spec_of_conv(conv, self.residual_at, self.branch_scale, self.activation, bn.eps),
        )  # fmt: skip

    def _rir_operations(self):
        return [(_pattern(self), _obstacle(self))]


def _pattern(unit):
    return "conv_bn" if unit.activation is None else "conv_bn_act"


def _obstacle(unit):
    conv = unit._modules.get("conv")
    if reason := conv_obstacle(conv) or norm_obstacle(unit._modules.get("bn")):
        return reason
    return "" if conv.padding == padding_of(conv) else f"padding={conv.padding!r}: expected numbers"


def _find(unit):
    parts = ("conv", "bn")
    if reason := _obstacle(unit):
        return [Refusal(reason, parts)]
    return [Match(_pattern(unit), parts)]


def _folds(unit):
    if bypass_obstacle(unit._modules.get("conv"), Conv2d) or norm_obstacle(unit._modules.get("bn")):
        return []
    return [Fold("bn", "conv" if unit.residual_at == "post_norm" else None)]


FAMILY = Family(**exactly(lambda: reference.ConvBNAct), find=_find, mixin=FusedConvBNAct, folds=_folds)
