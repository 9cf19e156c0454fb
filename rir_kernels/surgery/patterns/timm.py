"""timm (as of 1.0): norm and activation are one module in its pre-activation ResNets and many others."""

from ..registry import norm_act

norm_act("timm.layers.norm_act.BatchNormAct2d", activation="act", nothing="drop")
