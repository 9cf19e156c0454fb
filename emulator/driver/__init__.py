"""A CUDA driver without a GPU: all of Triton's launch path runs, and what it launches is handed to a function.

`Driver` must be made before Triton starts anything, with TRITON_INTERPRET unset. It builds `libcuda.c` with the C
compiler that Triton itself needs. A CPU's tensors then stand for a GPU's, in all of the process.
"""

import ctypes
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rir_kernels.common import devices

SOURCE = Path(__file__).with_name("libcuda.c")


def missing() -> str:
    """What Triton's launcher needs and this machine lacks; or an empty string."""
    if shutil.which("cc") is None:
        return "a C compiler"
    return "" if Path(sysconfig.get_paths()["include"], "Python.h").exists() else "Python's headers"


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("programmatic", ctypes.c_int),
        ("stream", ctypes.c_ulonglong),
        ("function", ctypes.c_ulonglong),
    ]


_ON_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch), ctypes.POINTER(ctypes.c_void_p))
_LAUNCH_FAILED = 719


@dataclass
class Request:
    """A launch as the driver got it."""

    compiled: object  # Triton's CompiledKernel
    grid: tuple[int, int, int]
    block: int  # threads
    shared: int  # bytes
    programmatic: bool  # may start before the launch ahead of it ends
    stream: int
    tensors: list[torch.Tensor] | None  # its arguments; None where a launcher was called without them
    params: object

    def parameter(self, index: int, size: int) -> bytes:
        return ctypes.string_at(self.params[index], size)


class Driver:
    """Made once a process. `arch`: the GPU's, 90 for sm_90. `on_launch` gets each launch; what it raises, the caller of
    the launch sees as a RuntimeError with the same text."""

    def __init__(self, arch: int = 90):
        self.arch = arch
        self.on_launch: Callable[[Request], None] | None = None
        self.stream = 0  # the current one
        self._compiled: dict[int, object] = {}  # by the driver's handle
        self._tensors: list[torch.Tensor] | None = None
        self._library = self._build()
        self._activate()
        devices.all_stand_for(f"an emulated sm_{arch}", "cpu")

    @property
    def maps(self) -> int:
        """Tensor maps that were encoded so far."""
        return self._library.driver_maps()

    def _build(self):
        import triton

        self._folder = tempfile.TemporaryDirectory(prefix="rir-driver-")  # for as long as launchers are linked
        library = Path(self._folder.name, "libcuda.so.1")
        include = Path(triton.__file__).parent / "backends/nvidia/include"
        flags = ["-shared", "-fPIC", "-O1", "-Wno-unused-parameter", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["cc", *flags, f"-I{include}", "-o", library, SOURCE], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = self._folder.name
        loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._callback = _ON_LAUNCH(self._launched)
        loaded.driver_on_launch(self._callback)
        return loaded

    def _activate(self):
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime.driver import driver

        ours = self

        class Launcher(CudaLauncher):
            def __call__(self, *args):
                ours._tensors = list(_tensors(args))
                try:
                    super().__call__(*args)
                finally:
                    ours._tensors = None

        class Stand(CudaDriver):
            def __init__(self):  # torch has no CUDA to ask
                self.utils, self.launcher_cls = CudaUtils(), Launcher

            def get_current_target(self):
                return GPUTarget("cuda", ours.arch, 32)

            def get_current_device(self):
                return 0

            def get_current_stream(self, _device):
                return ours.stream

            def get_active_torch_device(self):
                return torch.device("cpu")

        driver.set_active(Stand())
        init_handles = CompiledKernel._init_handles

        def recorded(compiled):
            init_handles(compiled)
            ours._compiled[compiled.function] = compiled

        CompiledKernel._init_handles = recorded

    def _launched(self, launch, params):
        if self.on_launch is None:
            return 0
        given = launch.contents
        try:
            self.on_launch(
                Request(self._compiled[given.function], tuple(given.grid), given.block, given.shared,
                        bool(given.programmatic), given.stream, self._tensors, params)
            )  # fmt: skip
        except BaseException as error:  # no exception passes through C
            self._library.driver_refuse(f"{type(error).__name__}: {error}".encode()[:4000])
            return _LAUNCH_FAILED
        return 0


def _tensors(args):
    for arg in args:
        arg = getattr(arg, "base", arg)  # a descriptor's
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, tuple | list):
            yield from _tensors(arg)
