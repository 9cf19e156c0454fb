"""GPUs other than sm_90, each in a new process: --arch chooses what Triton compiles for."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.machine
ROOT = Path(__file__).resolve().parents[2]
# mma.sync, ldmatrix and cp.async in place of wgmma and TMA: a layer's three convolutions in bf16
TESTS = ["tests/kernels/test_conv.py", "-k", "test_forward_and_both_gradients and bfloat16 and (stride or odd)"]


def test_before_hopper():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--emulated", "--arch", "80"]
    ended = subprocess.run([*command, *TESTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
