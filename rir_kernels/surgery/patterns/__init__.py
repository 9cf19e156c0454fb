"""The kinds of module that can be fused, one file each. To add one, write its file and name its FAMILY here."""

from . import rir_layer, rir_unit, sequential
from .base import PATTERNS, Family, Match, Refusal

FAMILIES: tuple[Family, ...] = (sequential.FAMILY, rir_layer.FAMILY, rir_unit.FAMILY)

__all__ = ["FAMILIES", "PATTERNS", "Family", "Match", "Refusal"]
