"""Is one module the same function as another? `compare` answers; `criterion` explains how it judges, and why."""

from .compare import compare
from .report import EquivalenceReport, EquivalenceRow
from .runs import Run, observe
from .yardstick import Yardstick

__all__ = ["EquivalenceReport", "EquivalenceRow", "Run", "Yardstick", "compare", "observe"]
