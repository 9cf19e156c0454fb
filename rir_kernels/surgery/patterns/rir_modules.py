"""rir_kernels' own modules: they already run fused; only folding applies to them."""

from ...modules import ConvBNAct, RiRLayer
from ..bypass import bypass_obstacle, norm_obstacle
from ..class_swap import Fused
from ..classes import Conv2d
from .base import Family, Fold, Match, no_folds


def _knows(kind):
    return issubclass(kind, (ConvBNAct, RiRLayer))


def _folds(module):
    if type(module) not in (ConvBNAct, RiRLayer) or norm_obstacle(module.bn):
        return []
    if type(module) is RiRLayer or module.residual_at == "pre_norm":
        return [Fold("bn")]
    return [] if bypass_obstacle(module.conv, Conv2d) else [Fold("bn", "conv")]


def _runs(module):
    if type(module).forward not in (ConvBNAct.forward, RiRLayer.forward):
        return []
    if isinstance(module, RiRLayer):
        return [Match("conv_add_bn_act", ("bn",))]
    pattern = "conv_bn" if module.activation is None else "conv_bn_act"
    if module.residual_at == "pre_norm":
        pattern = "conv_add_bn_act"
    return [Match(pattern, ("conv", "bn"))]


FAMILY = Family(knows=_knows, obstacle=lambda kind: "", find=no_folds, mixin=Fused, folds=_folds, runs=_runs)
