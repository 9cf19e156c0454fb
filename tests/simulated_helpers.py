"""Programs of tests/simulated, each of which needs a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "simulated"
HEADER = Path(sysconfig.get_paths()["include"], "Python.h")

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or not HEADER.exists(),
    reason="Triton's launcher needs a C compiler and Python's headers",
)


def simulated(program, folder, *arguments, **environment):
    """What the program prints, as data; AssertionError where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parents[1]), *sys.path])
    command = [sys.executable, FOLDER / program, folder, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
