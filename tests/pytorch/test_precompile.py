"""precompile compiles what a model will launch, most of which serves other batches too."""

import os
import subprocess
import sys

import pytest
import torch

import rir_kernels as rir
from tests.support.simulated_helpers import needs_compiler, simulated

pytest.importorskip("triton")


@needs_compiler
def test_steps_after_it_compile_nothing(tmp_path):
    found = simulated("precompiled.py", tmp_path)
    training, inference, again = found["reports"]
    assert training["kernels"] == training["compiled"] > 5
    assert inference["kernels"] == inference["compiled"] == 1
    assert (again["kernels"], again["compiled"]) == (training["kernels"], 0)
    assert found["missed"] == []


def test_kernels_of_other_batches(tmp_path):
    """By Triton's own cache keys. A batch under the same power of two needs none that the larger one did not have."""
    found = simulated("batches.py", 128, 127, 80, 64, 40, 8, 1)
    for name, counts in found.items():
        kernels = counts["128"]["kernels"]
        assert all(count["jobs"] == count["kernels"] for count in counts.values())
        assert counts["127"]["new"] == counts["80"]["new"] == 0
        # where a wide RiR has fewer programs than the GPU has multiprocessors, a tile kept would cost 40 % and more
        share = 0.2 if name == "rir_wide" else 0.15
        assert counts["64"]["new"] == counts["40"]["new"] <= share * kernels
        assert counts["8"]["new"] <= kernels / 2 and counts["1"]["new"] <= kernels / 2


CALLS = {
    "rir.precompile('model', x, arch='sm_90')": "TypeError: model must be a torch.nn.Module, got str",
    "rir.precompile(model, x, arch='h100')": 'ValueError: arch must be as "sm_90", from "sm_80" on, got \'h100\'',
    "rir.precompile(model, x, arch='sm_75')": 'ValueError: arch must be as "sm_90", from "sm_80" on, got \'sm_75\'',
    "rir.precompile(model, x, arch='sm_90', workers=0)": "ValueError: workers must be a positive int, got 0",
    "rir.precompile(model, x, arch='sm_90', batch_sizes=[8, -1])": (
        "ValueError: batch_sizes must be a positive int, got -1"
    ),
    "rir.precompile(Reading(), x, arch='sm_90')": "RuntimeError: the forward reads values",
    "rir.precompile(torch.nn.ReLU(), x, arch='sm_90')": "0 kernels, 0 of them compiled in ",
}
PROGRAM = """
import torch, rir_kernels as rir

class Reading(torch.nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x

x, model = torch.zeros(1, 3, 4, 4), torch.nn.ReLU()
for call in CALLS:
    try:
        print(eval(call))
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
"""


def test_what_it_says():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = PROGRAM.replace("CALLS", repr(list(CALLS)))
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    said = result.stdout.splitlines()
    assert len(said) == len(CALLS), result.stderr
    for line, expected in zip(said, CALLS.values(), strict=True):
        assert line.startswith(expected)


def test_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 nothing is compiled: unset it"):
        rir.precompile(torch.nn.ReLU(), torch.zeros(1), arch="sm_90")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_architecture_is_asked_for(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match='there is no GPU here: name the one that will be, as arch="sm_90"'):
        rir.precompile(torch.nn.ReLU(), torch.zeros(1))
