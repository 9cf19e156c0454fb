"""The kinds of module that can be fused, one file each. To add one, write its file and name it here."""

from . import pytorchcv, rir_layer, rir_unit, timm, traced
from .base import PATTERNS, Family, Match, Refusal

# the first that knows a class has it
FAMILIES: list[Family] = [rir_layer.FAMILY, rir_unit.FAMILY, traced.FAMILY]
# classes of other libraries whose forward is traced as well, with what has to be known of them
LIBRARIES = (pytorchcv, timm)

__all__ = ["FAMILIES", "LIBRARIES", "PATTERNS", "Family", "Match", "Refusal"]
