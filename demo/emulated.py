"""The kernels as compiled for a GPU, in bf16, executed on this CPU: in a process that has no interpreter."""

import json
import os
import subprocess
import sys

import torch

from emulator import driver

from . import kernels


def obstacle() -> str:
    """Why that cannot be here, or an empty string."""
    return kernels.obstacle(torch.device("cpu")) or driver.missing()


def check() -> list[dict]:
    """The cases of `kernels.check` for two small layers. RuntimeError where the other process fails."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "demo.emulated"], env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise RuntimeError(f"the emulator failed:\n{ended.stderr}")
    return json.loads(ended.stdout)


def _main():
    from emulator.run import Emulator

    emulator = Emulator(driver.Driver())
    torch.set_num_threads(1)
    cases = [case for layer in kernels.SMALL[::2] for case in kernels.check(torch.bfloat16, layer, torch.device("cpu"))]
    assert emulator.records, "nothing was launched"
    json.dump(cases, sys.stdout)


if __name__ == "__main__":
    _main()
