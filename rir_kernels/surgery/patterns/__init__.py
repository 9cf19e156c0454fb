"""The kinds of module that can be fused, one file each. To add one, write its file and list it here."""

from ..pattern_names import PATTERNS
from . import own, pytorchcv, reference_unit, registered, rir_layer, rir_unit, timm, traced
from .base import Family, Fold, Match, Refusal
from .registered import register_pattern, unregister_pattern

# registrations for classes of other libraries, whose forward is traced as well
LIBRARIES = (pytorchcv, timm)


def families() -> list[Family]:
    """Returns the families in order of precedence: the first that knows a class handles it."""
    known = (own, reference_unit, rir_layer, rir_unit, traced)
    return [*registered.FAMILIES.values(), *(module.FAMILY for module in known)]


__all__ = [
    "LIBRARIES", "PATTERNS", "Family", "Fold", "Match", "Refusal", "families", "register_pattern", "unregister_pattern",
]  # fmt: skip
