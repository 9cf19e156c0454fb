"""rir_kernels.reference.RiRLayer: conv_add_bn_act, with all its options and both call forms."""

from ... import reference
from ...common.stream_views import join, split
from ...common.streams import PACKED, as_streams, check_image
from ...reference.functional import check_dtypes
from ..bypass import call_obstacle
from ..class_swap import Fused
from ..fallback import note
from . import packed_convs
from .base import Family, Fold, Match, Refusal, exactly
from .packed_convs import Layer

_CONVS = ("conv_rr", "conv_rt", "conv_tr", "conv_tt")
_NORMS = ("bn_r", "bn_t")


class FusedRiRLayer(Fused):
    def forward(self, x, t=PACKED, *, outer=None):
        layer = _layer(self)
        given = [s for s in (x, None if t is PACKED else t, outer) if s is not None]
        asked = call_obstacle(*given)
        if reason := asked or _obstacle(layer):
            note(self, given, reason, asked=bool(asked))
            return super().forward(x, t, outer=outer)

        packed = t is PACKED
        streams = (x,) if packed else as_streams(x, t, self.in_residual, self.in_channels)
        check_dtypes(*streams, outer, *self._weights())
        x = x if packed else join(*streams)
        check_image("x", x, self.in_channels)
        residuals = [] if self.projection is None else [self.projection(split(x, self.in_residual)[0])]
        if outer is not None:
            residuals.append(outer)
        identity = self.shortcut != "none" and self.projection is None
        y = packed_convs.run(
            layer,
            x,
            residuals=tuple(residuals),
            shortcut_channels=min(self.in_residual, self.out_residual) if identity else 0,
            branch_scale=self.branch_scale,
            impl=self._rir_fusion.impl,
        )
        return y if packed else split(y, self.out_residual)

    def _rir_operations(self):
        return [("conv_add_bn_act", _obstacle(_layer(self)))]


def _obstacle(layer):
    return packed_convs.obstacle(layer) or packed_convs.counts_obstacle(layer)


def _find(module):
    layer = _layer(module)
    parts = tuple(name for name in (*_CONVS, *_NORMS) if name in module._modules)
    reason = packed_convs.obstacle(layer)
    return [Refusal(reason, parts) if reason else Match("conv_add_bn_act", parts)]


def _layer(module):
    modules = module._modules
    return Layer(
        convs={name: modules.get(name) for name in _CONVS},
        norms={name: modules.get(name) for name in _NORMS},
        inputs=(module.in_residual, module.in_channels - module.in_residual),
        outputs=(module.out_residual, module.out_channels - module.out_residual),
        kernel_size=module.kernel_size,
        stride=(module.stride, module.stride),
    )


def _folds(module):
    if packed_convs.obstacle(_layer(module)):
        return []
    return [Fold(name) for name in _NORMS if module._modules.get(name) is not None]


FAMILY = Family(**exactly(lambda: reference.RiRLayer), find=_find, mixin=FusedRiRLayer, folds=_folds)
