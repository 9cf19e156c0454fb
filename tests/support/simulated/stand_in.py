"""A driver that launches nothing, for programs that look at launches."""

import os

from emulator.driver import Driver


def activate() -> Driver:
    """For the GPU of $SIMULATED_ARCH, 90 by default, whose tensors a CPU's stand for."""
    return Driver(int(os.environ.get("SIMULATED_ARCH", "90")))
