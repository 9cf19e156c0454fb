"""python -m tests.fuzz torch|hybrid|triton cpu|cuda 'CASE': one call again, as a failure of test_fuzz.py printed it."""

import json
import os
import sys

if "cpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from .cases import Case
from .judge import check, use_test_settings
from .layers import LayerCase, check_layer

impl, device, text = sys.argv[1:]
use_test_settings()
if "num_layers" in json.loads(text):
    check_layer(LayerCase.from_text(text), impl, device)
else:
    check(Case.from_text(text), impl, device)
print("right")
