"""Which device a tensor is on, or stands in for."""

import contextlib
import functools
import threading

import torch


class _PerThread(threading.local):
    # (device type, GPU name): tensors on devices of that type stand in for tensors on that GPU
    stand_in: tuple[str, str] | None = None


_thread = _PerThread()


@contextlib.contextmanager
def standing_for(gpu: str, kind: str = "meta"):
    """Treats tensors on devices of that kind, in this thread, as tensors on a GPU that runs the kernels.

    gpu: its name, or "".
    """
    _thread.stand_in, saved = (kind, gpu), _thread.stand_in
    try:
        yield
    finally:
        _thread.stand_in = saved


def all_stand_for(gpu: str, kind: str) -> None:
    """Does the same for the whole process, permanently: its CPU emulates a GPU."""
    _thread.stand_in = _PerThread.stand_in = kind, gpu


def device_kind(device: torch.device) -> str:
    """The device's type; a GPU's if meta tensors stand in for tensors on one."""
    return "cuda" if device.type == "meta" and _stands_in(device) else device.type


def _stands_in(device):
    return _thread.stand_in is not None and _thread.stand_in[0] == device.type


def on_gpu(x: torch.Tensor) -> bool:
    """Whether x is on a GPU, or stands in for a tensor on one."""
    return x.device.type == "cuda" or _stands_in(x.device)


def gpu_name(x: torch.Tensor) -> str:
    """The name of the GPU that x is on, or stands in for a tensor on."""
    if x.device.type == "cuda":
        return _name_at(x.device.index)
    return _thread.stand_in[1] if _thread.stand_in else ""


@functools.cache
def _name_at(index: int) -> str:
    return torch.cuda.get_device_name(index)
