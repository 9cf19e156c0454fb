"""The kinds of module that can be fused, one file each. To add one, write its file and list it here."""

from ..pattern_names import PATTERNS
from . import fx_traced, pytorchcv, reference_unit, registered, rir_layer, rir_modules, rir_unit, timm  # noqa: F401  # they register those libraries' classes
from .base import Family, Fold, Match, Refusal
from .registered import register_pattern, unregister_pattern


def families() -> list[Family]:
    """Returns the families in order of precedence: the first that knows a class handles it."""
    known = (rir_modules, reference_unit, rir_layer, rir_unit, fx_traced)
    return [*registered.FAMILIES.values(), *(module.FAMILY for module in known)]


__all__ = [
    "PATTERNS", "Family", "Fold", "Match", "Refusal", "families", "register_pattern", "unregister_pattern",
]  # fmt: skip
