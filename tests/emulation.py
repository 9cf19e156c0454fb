"""`pytest --emulated`: tests marked gpu run what Triton compiles for sm_90 on this machine's CPU, by `emulator/`.

A CPU's tensors stand for a GPU's. What such a test shows is what the compiled code computes, not how a GPU runs it.
"""

import os

import torch

from emulator import run
from emulator.driver import Driver
from rir_kernels import dispatch

NAME = "an emulated sm_90"

# this process's
driver: Driver | None = None
emulator: run.Emulator | None = None


def start() -> None:
    """Before anything imports Triton."""
    global driver, emulator
    os.environ["TRITON_INTERPRET"] = "0"
    driver = Driver()
    emulator = run.Emulator(driver)
    dispatch.all_stand_for(NAME, "cpu")


def gpu() -> torch.device:
    """Where the tensors of tests marked gpu lie."""
    return torch.device("cuda" if emulator is None else "cpu")
