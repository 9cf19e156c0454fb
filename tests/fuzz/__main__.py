"""python -m tests.fuzz torch|hybrid|triton cpu|cuda 'CASE': one call again, as a failure of test_fuzz.py printed it."""

import os
import sys

if "cpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from .cases import Case
from .judge import check

impl, device, text = sys.argv[1:]
check(Case.from_text(text), impl, device)
print("right")
