"""The emulated GPU, for tests that look at it themselves."""

import pytest
import torch

from tests.support import emulation


@pytest.fixture
def emulator():
    """This process's, of `pytest --emulated`; in lockstep, and with no launch recorded yet."""
    emulation.emulator.records.clear()
    return emulation.emulator


@pytest.fixture
def tf32(monkeypatch):
    """fp32 convolutions on the tensor cores."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")
