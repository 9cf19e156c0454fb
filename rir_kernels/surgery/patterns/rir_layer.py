"""rir_kernels.reference.RiRLayer: P4, with its options and both call forms."""

from ... import reference
from ...joining import join
from ...reference.functional import check_dtypes
from ...streams import PACKED, as_streams, check_image
from ..guards import call_obstacle
from ..swap import Fused
from . import four_convs
from .base import Family, Match, Refusal
from .four_convs import Layer


class FusedRiRLayer(Fused):
    def forward(self, x, t=PACKED, *, outer=None):
        layer = _layer(self)
        given = [s for s in (x, None if t is PACKED else t, outer) if s is not None]
        if _obstacle(self, layer) or call_obstacle(*given) or not four_convs.counts_agree(layer):
            return super().forward(x, t, outer=outer)

        packed = t is PACKED
        streams = (x,) if packed else as_streams(x, t, self.in_residual, self.in_channels)
        check_dtypes(*streams, outer, *(conv.weight for conv in layer.convs.values() if conv is not None))
        x = join(*streams) if not packed else x
        check_image("x", x, self.in_channels)
        residuals = [] if self.projection is None else [self.projection(x[:, : self.in_residual])]
        if outer is not None and outer.shape[1] > 0:
            residuals.append(outer)
        y = four_convs.run(
            layer,
            x,
            residuals=tuple(residuals),
            shortcut_channels=_identity_channels(self),
            branch_scale=self.branch_scale,
            impl=self._rir_fusion.impl,
        )
        return y if packed else (y[:, : self.out_residual], y[:, self.out_residual :])


def _find(module):
    layer = _layer(module)
    parts = tuple(name for group in layer for name, part in group.items() if part is not None)
    reason = _obstacle(module, layer)
    return [Refusal(reason, parts) if reason else Match("P4", parts)]


def _layer(module):
    return Layer(
        {name: getattr(module, name) for name in ("conv_rr", "conv_rt", "conv_tr", "conv_tt")},
        {name: getattr(module, name) for name in ("bn_r", "bn_t")},
    )


def _obstacle(module, layer):
    inputs = module.in_residual, module.in_channels - module.in_residual
    outputs = module.out_residual, module.out_channels - module.out_residual
    if reason := four_convs.obstacle(layer) or four_convs.misfit(layer, inputs, outputs):
        return reason
    if _identity_channels(module) and not four_convs.keeps_size(layer, module.stride):
        return "the shortcut does not have the convolutions' output size"
    return ""


def _identity_channels(module):
    if module.shortcut == "none" or module.projection is not None:
        return 0
    return min(module.in_residual, module.out_residual)


FAMILY = Family(target=lambda: reference.RiRLayer, find=_find, mixin=FusedRiRLayer)
