"""The names that modules had in version 0.1. Pickled models, and the source text within them, import by these."""

import sys

from . import class_swap, folded_norm, runtime
from .patterns import fx_traced

for _name, _module in {
    "folded_norm": folded_norm,
    "surgery.swap": class_swap,
    "surgery.units": runtime,
    "surgery.patterns.traced": fx_traced,
}.items():
    sys.modules.setdefault(f"rir_kernels.{_name}", _module)
