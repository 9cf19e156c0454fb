"""Faults put into correct PTX are noticed: by a wrong result, a report, or a refusal."""

import pytest
import torch

from tests.support import emulation

from .faults import FAULTS as FAULTS_OF
from .judge import assert_no_race
from .layer import Layer

pytestmark = pytest.mark.machine
FAULTS = FAULTS_OF[emulation.driver.arch if emulation.driver else 90]
# as small as can be with a loop of products that are waited for later
BF16 = torch.bfloat16
LAYERS = {"plain": (BF16, 192, 64, 8, 1), "norm": (BF16, 64, 64, 8, 1), "wgrad": (BF16, 16, 64, 8, 2)}


@pytest.mark.parametrize("name", FAULTS)
def test_is_noticed(name, emulator):
    kernel, operation, fault = FAULTS[name]
    layer, has_place = Layer(*LAYERS[operation], batch=256 if operation != "wgrad" else 0), []

    def change(kernel_name, ptx):
        if kernel_name != kernel:
            return ptx
        changed = fault(ptx)
        has_place.append(changed not in (None, ptx))
        return changed or ptx

    with emulator.late(), emulator.changed(name, change):
        noticed = _noticed(layer, operation, emulator)
    assert has_place and all(has_place), "the fault has no place in this PTX"
    assert noticed


def _noticed(layer, operation, emulator):
    try:
        layer.check(operation)
        assert_no_race(emulator.records)
    except (AssertionError, RuntimeError) as error:  # what a launch is refused for comes through Triton's launcher
        return str(error)
    return ""


@pytest.mark.parametrize("operation", LAYERS)
def test_without_a_fault_there_is_nothing_to_notice(operation, emulator):
    layer = Layer(*LAYERS[operation], batch=256 if operation != "wgrad" else 0)
    with emulator.late():
        assert not _noticed(layer, operation, emulator)
