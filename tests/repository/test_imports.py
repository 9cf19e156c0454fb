"""What importing the package does not need, and what is said where triton is missing. Each in a process of its own."""

import os
import subprocess
import sys

BLOCK_TRITON = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, Blocked())
"""

CALL = """
import torch
import rir_kernels as rir

def call(impl, device="cpu"):
    mean, var = torch.zeros(4), torch.ones(4)
    x, weight = torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3, 3)
    try:
        return rir.functional.conv_bn_act(x, weight, running_mean=mean, running_var=var, training=True, impl=impl)
    except Exception as error:
        assert torch.equal(mean, torch.zeros(4)) and torch.equal(var, torch.ones(4))
        return f"{type(error).__name__}: {error}"
"""


def run_python(code, interpret=None):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_import_and_calls_use_no_network():
    """Nor does any of it start a program."""
    code = """
import sys
import torch, torch.fx
seen = []

def hook(event, _):
    if event.partition(".")[0] in ("socket", "subprocess", "urllib"):
        seen.append(event)

sys.addaudithook(hook)
import rir_kernels as rir
model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), rir.RiRBlock(4, 6))
rir.fuse_(model)
model(torch.randn(2, 4, 5, 5)).sum().backward()
print(seen)
"""
    assert run_python(code) == "[]\n"


def test_import_is_lean():
    """Neither triton nor a GPU is touched, nor by building and running modules on a CPU."""
    code = """
import sys
import rir_kernels as rir
print([name for name in sys.modules if name.partition(".")[0] == "triton" or name.startswith("rir_kernels.triton")])
import torch
layer = rir.RiRBlock(4, 6, stride=2)
layer(torch.randn(2, 4, 5, 5)).sum().backward()
print([name for name in sys.modules if name.partition(".")[0] == "triton" or name.startswith("rir_kernels.triton")])
print(torch.cuda.is_initialized())
"""
    assert run_python(code).split("\n") == ["[]", "[]", "False", ""]
