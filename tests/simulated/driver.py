"""A CUDA driver that writes launches down: all of Triton's launch path runs on a machine without a GPU.

`activate` must come before Triton starts anything, with TRITON_INTERPRET unset; it builds `libcuda.c` with the C
compiler that Triton itself needs. SIMULATED_ARCH in the environment is the GPU's architecture, 90 by default. What is
launched is read with `Launches`.
"""

import ctypes
import os
import subprocess
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

HERE = Path(__file__).parent


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("programmatic", ctypes.c_int),
        ("function", ctypes.c_ulonglong),
        ("params", (ctypes.c_ubyte * 128) * 128),
    ]


def activate(folder: Path):
    """Builds the library in `folder`, and makes Triton launch through it; the loaded library."""
    library = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wno-unused-parameter", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", library, HERE / "libcuda.c"], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.simulated_last.restype = ctypes.POINTER(_Launch)

    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime.driver import driver

    class Driver(CudaDriver):
        def __init__(self):  # torch has no CUDA to ask
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

        def get_current_target(self):
            return GPUTarget("cuda", int(os.environ.get("SIMULATED_ARCH", "90")), 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, _device):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

    driver.set_active(Driver())
    return loaded
