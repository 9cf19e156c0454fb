"""Launches that are carried out on the CPU."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .driver import Driver, Request
from .machine import Fault, late, lockstep
from .machine.global_memory import GlobalMemory, WatchedMemory
from .machine.threads import Kernel, Launch
from .ptx import parse


@dataclass
class Record:
    """A launch that has run."""

    name: str
    programs: int
    seconds: float
    stream: int
    shared: int
    compiled: object
    reports: list[str] = field(
        default_factory=list
    )  # what `races` saw, with a program that did it; "note: ..." is harmless


class Emulator:
    """Carries out what is launched on a driver without a GPU. `timing` ("lockstep", "late"), `seed` and `change` may be
    set between launches; `records` holds what ran."""

    def __init__(self, driver: Driver):
        self.timing, self.seed = "lockstep", 0
        # function(kernel's name, PTX) of what runs instead, and a name for it
        self.change: tuple[str, Callable[[str, str], str]] = ("", lambda name, ptx: ptx)
        self.records: list[Record] = []
        self._kernels: dict[tuple[str, str], Kernel] = {}
        driver.on_launch = self.launch

    @contextlib.contextmanager
    def late(self, seed: int = 0):
        """Within it what is asynchronous happens as late as it may, and races are reported."""
        before = self.timing, self.seed
        self.timing, self.seed = "late", seed
        try:
            yield
        finally:
            self.timing, self.seed = before

    @contextlib.contextmanager
    def changed(self, name: str, change: Callable[[str, str], str]):
        """Within it change(kernel's name, PTX) runs instead of a kernel's PTX."""
        before, self.change = self.change, (name, change)
        try:
            yield
        finally:
            self.change = before

    def launch(self, request: Request) -> None:
        began = time.perf_counter()
        name, programs = request.compiled.metadata.name, request.grid[0]
        if request.grid[1:] != (1, 1):
            raise Fault(f"{name}: a grid of {request.grid}; one dimension is known")
        kernel = self._kernel(request.compiled)
        if request.block != kernel.program.threads:
            raise Fault(f"{name}: {request.block} threads, and the kernel is one of {kernel.program.threads}")
        record = Record(name, programs, 0.0, request.stream, request.shared, request.compiled)
        self.records.append(record)
        parameters = _parameters(request, kernel)
        memory = _writable() if request.tensors is None else [_storage(tensor) for tensor in request.tensors]
        try:
            if self.timing == "late":
                seen: dict[str, int] = {}
                # of a launcher that was taken apart only addresses are known: all that this process has may be touched
                watched = WatchedMemory(memory, None) if request.tensors is not None else GlobalMemory(memory)
                late.run(Launch(kernel, watched, parameters, programs), request.shared, self.seed, seen)
                record.reports = [f"{text} (program {program})" for text, program in seen.items()]
            else:
                lockstep.run(Launch(kernel, GlobalMemory(memory), parameters, programs), request.shared)
        finally:
            record.seconds = time.perf_counter() - began

    def _kernel(self, compiled) -> Kernel:
        key = compiled.hash, self.change[0]
        if key not in self._kernels:
            ptx = self.change[1](compiled.metadata.name, compiled.asm["ptx"])
            self._kernels[key] = Kernel(parse(ptx))
        return self._kernels[key]


def _parameters(request, kernel):
    """The block of parameters, as `ptx` has laid it out."""
    places = kernel.program.parameters.values()
    block = bytearray(max((offset + size for offset, size in places), default=0))
    for index, (offset, size) in enumerate(places):
        block[offset : offset + size] = request.parameter(index, size)
    return bytes(block)


def _storage(tensor):
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _writable():
    """All memory of this process that is its own, as (address, bytes); what adjoins is one."""
    # twice, as a line may be missing where another thread maps memory meanwhile
    lines = {line for _ in range(2) for line in Path("/proc/self/maps").read_text().splitlines()}
    places = []
    for place, rights, *rest in map(str.split, lines):
        if rights.startswith("rw") and not (len(rest) == 4 and rest[3].startswith("[v")):
            places.append([int(address, 16) for address in place.split("-")])
    found: list[list[int]] = []
    for start, end in sorted(places):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return [(start, end - start) for start, end in found]
