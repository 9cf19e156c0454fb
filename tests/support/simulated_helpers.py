"""Programs of tests/support/simulated, each of which needs its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulator.driver import missing

FOLDER = Path(__file__).parent / "simulated"

needs_compiler = pytest.mark.skipif(bool(missing()), reason=f"Triton's launcher needs {missing()}")


def simulated(program, *arguments, **environment):
    """What the program prints, as data; AssertionError where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parents[1]), *sys.path])
    command = [sys.executable, FOLDER / program, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
