"""A stand-in for a CUDA device, so that commands for a GPU run from end to end on a machine without one.

Within `stand_in()` "cuda" means the CPU to every torch function, torch.cuda's clocks and graphs are imitated, and our
kernels run in Triton's interpreter. What a command does in Python is then the same as on a GPU. Its figures mean
nothing: they are a CPU's, and a replayed graph does nothing at all.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from bench.measure import ceilings, timing
from bench.schema import read_json

NAME = "stand-in (no GPU)"
CPU = torch.device("cpu")


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Within it this thread finds a CUDA device, which is the CPU. For a process that has not used triton yet.

    RuntimeError where triton was imported to compile kernels: it decides at its import whether it interprets them.
    """
    from rir_kernels.common.switches import interpreting

    if "triton" in sys.modules and not interpreting():
        raise RuntimeError("triton was imported without TRITON_INTERPRET=1: use a new process for the stand-in")
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from rir_kernels.triton.launch import runtime

    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=4, total_memory=2**30, L2_cache_size=2**16, uuid="none"
    )
    imitations = {
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": _Graph,
        "graph": lambda graph, pool=None: contextlib.nullcontext(),
        "graph_pool_handle": lambda: None,
    }
    # the interpreter runs programs one after the other: tiles are chosen as if there were one multiprocessor
    one = dataclasses.replace(runtime.H200, sms=1)
    with (
        mock.patch.multiple(torch.cuda, **imitations),
        mock.patch.object(timing, "GRAPH_MS", 0.0),  # one call a graph: replayed, any number takes no time
        mock.patch.object(runtime, "H200", one),
        mock.patch.dict(ceilings.SIZES, cuda=(2**16, 2**12, 64)),
        _OnTheCPU(),
    ):
        yield


def check_folder(folder: Path) -> None:
    """ValueError where the folder holds results of a real device, which those of the stand-in would replace."""
    for path in sorted(folder.glob("*.json")):
        device = (read_json(path) or {}).get("device", {}).get("name", NAME)
        if device != NAME:
            raise ValueError(f"{path} was measured on {device}: give the stand-in another folder with --out")


class _OnTheCPU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:  # a device may still be spoken of
            return function(*args, **kwargs)
        return function(*map(_moved, args), **{name: _moved(value) for name, value in kwargs.items()})


def _moved(value):
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    return CPU if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class _Event:
    def __init__(self, enable_timing=False):
        self._at = None

    def record(self):
        self._at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end) -> float:
        return (end._at - self._at) * 1e3


class _Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, _):
        pass


class _Graph:
    def replay(self):
        pass
