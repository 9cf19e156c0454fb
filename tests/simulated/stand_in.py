"""A driver that launches nothing, for programs that look at launches."""

import os

from emulator.driver import Driver
from rir_kernels import dispatch


def activate() -> Driver:
    """For the GPU of $SIMULATED_ARCH, 90 by default, whose tensors a CPU's stand for."""
    driver = Driver(int(os.environ.get("SIMULATED_ARCH", "90")))
    dispatch.all_stand_for("", "cpu")
    return driver
