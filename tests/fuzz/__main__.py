"""python -m tests.fuzz torch|hybrid|triton cpu|cuda 'CASE': one call again, as a failure of test_fuzz.py printed it.

python -m tests.fuzz forward FILE: a module and its change, as a failure of test_forwards.py printed them.
"""

import json
import os
import sys

if "cpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from pathlib import Path

from .cases import Case
from .judge import check, use_test_settings
from .layers import LayerCase, check_layer
from .twins import check_fold, check_forward

*kind, text = sys.argv[1:]
use_test_settings()
if kind == ["forward"]:
    check_forward(Path(text).read_text())
    check_fold(Path(text).read_text())
elif "num_layers" in json.loads(text):
    check_layer(LayerCase.from_text(text), *kind)
else:
    check(Case.from_text(text), *kind)
print("right")
