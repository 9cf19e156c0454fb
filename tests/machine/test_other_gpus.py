"""GPUs other than sm_90, each in a new process: --arch chooses what Triton compiles for."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.machine
ROOT = Path(__file__).resolve().parents[2]
# a layer's three convolutions in bf16
LAYERS = ["tests/kernels/test_conv.py", "-k", "test_forward_and_both_gradients and bfloat16 and (stride or odd)"]


@pytest.mark.parametrize(
    "arch, tests",
    [
        pytest.param(80, LAYERS, id="mma.sync, ldmatrix and cp.async"),
        pytest.param(100, LAYERS, id="tcgen05"),
        pytest.param(100, ["tests/machine/test_faults.py"], marks=pytest.mark.long, id="tcgen05, faults"),
    ],
)
def test_in_place_of_wgmma(arch, tests):
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--emulated"]
    command += ["--arch", str(arch), *tests]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
