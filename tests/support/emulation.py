"""`pytest --emulated`: tests marked gpu run what Triton compiles for a GPU on this machine's CPU, by `emulator/`.

A CPU's tensors stand for a GPU's. What such a test shows is what the compiled code computes, not how a GPU runs it.
"""

import os

import torch

from emulator import run
from emulator.driver import Driver

# this process's
driver: Driver | None = None
emulator: run.Emulator | None = None


def start(arch: int) -> None:
    """Before anything imports Triton. arch: the GPU's, 90 for sm_90."""
    global driver, emulator
    os.environ["TRITON_INTERPRET"] = "0"
    driver = Driver(arch)
    emulator = run.Emulator(driver)


def gpu() -> torch.device:
    """Where the tensors of tests marked gpu lie."""
    return torch.device("cuda" if emulator is None else "cpu")
