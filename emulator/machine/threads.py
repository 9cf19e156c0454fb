"""Threads that run together: their registers, and where control is (PTX ISA 9.0, 9.5: divergence; 9.7.12, 9.7.13)."""

from dataclasses import dataclass, field

import numpy as np

from emulator.ptx import Program, Unsupported
from emulator.translate import Translator
from emulator.translate.numbers import LANES

from . import Fault
from .global_memory import GlobalMemory
from .shared import Shared
from .tensor_map import TensorMap


class Kernel:
    """A compiled kernel, and what is worked out once for all its launches."""

    def __init__(self, program: Program):
        self.program = program
        self.function = Translator(program).function
        self.operands: dict = {}  # a matrix descriptor and how it is read: indices into shared memory


@dataclass
class Launch:
    """What all programs of a launch have in common."""

    kernel: Kernel
    memory: GlobalMemory
    parameters: bytes
    programs: int
    _maps: dict[int, TensorMap] = field(default_factory=dict)

    def tensor_map(self, address: int) -> TensorMap:
        if address not in self._maps:
            offset = address & 0xFFFFFFFF  # from PARAMETERS, or extended from 32 bits
            self._maps[address] = TensorMap(self.parameters[offset : offset + 128])
        return self._maps[address]


class Threads:
    """Warps `first` to `first + warps` of each of the programs, which have a slot of shared memory each.

    `run` goes on until every thread has ended, waits at a barrier, or has looked at an mbarrier in vain. Translated
    code calls the methods that take a mask `m`; None stands for all threads.
    """

    def __init__(self, launch: Launch, shared: Shared, programs: range, first: int, warps: int):
        self.launch, self.shared, self.first = launch, shared, first
        program = launch.kernel.program
        self.is_whole = LANES * warps == program.threads
        tid = np.arange(LANES * first, LANES * (first + warps), dtype=np.uint32)
        self.width = len(tid) * len(programs)
        self.tid = np.tile(tid, len(programs))
        self.lane = self.tid % np.uint32(LANES)
        self.ctaid = np.repeat(np.array(programs, dtype=np.uint32), len(tid))
        self.nctaid, self.ntid = (self.full(np.uint32(n)) for n in (launch.programs, program.threads))
        self.slot = np.repeat(np.arange(len(programs)), len(tid))
        self.base = self.slot * shared.stride
        # what was never written is NaN
        unwritten = {bits: self.full(kind(-1 % (1 << bits))) for bits, kind in
                     ((16, np.uint16), (32, np.uint32), (64, np.uint64))} | {1: self.full(False)}  # fmt: skip
        self.registers = [unwritten[bits] for _, bits in program.registers.values()]
        self._parameters: dict = {}
        self.block, self._blocks = 0, None  # where all threads are; or None, and where each one is (-1: it has ended)
        self.has_ended = False
        self.barrier = np.full(self.width // LANES, -1)  # the one that a warp waits at
        self.expected = np.zeros(self.width // LANES, dtype=np.int64)  # threads that it waits for
        self._failed = None  # threads whose last look at an mbarrier was in vain
        self._vain = np.zeros(self.width, dtype=bool)  # those that should not look again before others have run

    # control flow

    def run(self) -> None:
        while not self.has_ended and not (self.barrier >= 0).all():
            if self._blocks is None:
                self._run_all()
            else:
                ready = (self._blocks >= 0) & ~self._vain & np.repeat(self.barrier < 0, LANES)
                if not ready.any():
                    break
                # the first block of those where threads are: what is behind a branch waits for both of its sides
                self._run_some(int(self._blocks[ready].min()), ready)
            if self._vain.all():
                break

    def retry(self) -> bool:
        """Lets threads look at mbarriers again that did so in vain; whether there are any."""
        had = bool(self._vain.any())
        self._vain[:] = False
        return had

    def _end(self, block):
        """How the block ends, and the predicate of a branch."""
        kind, *rest = self.launch.kernel.program.blocks[block].end
        if kind not in ("branch", "switch"):
            return kind, rest, None
        value = self.registers[self.launch.kernel.program.registers[rest[0]][0]]
        if kind == "switch":
            return kind, rest[1:], value
        return kind, rest[2:], ~value if rest[1] else value

    def _run_all(self):
        here = self.block
        self.launch.kernel.function(here, False)(self, self.registers, None)
        kind, rest, value = self._end(here)
        if kind == "jump":
            self.block = rest[0]
        elif kind == "branch" and (value.all() or not value.any()):
            self.block = rest[0] if value[0] else rest[1]
        elif kind == "switch" and (value == value[0]).all():
            self.block = rest[int(value[0])]
        elif kind in ("branch", "switch"):
            self._blocks = np.where(value, *rest) if kind == "branch" else np.array(rest)[value]
        elif kind == "barrier":
            self.block, barrier, expected = rest
            expected = expected or self.launch.kernel.program.threads
            if not (self.is_whole and expected == self.launch.kernel.program.threads):
                self.barrier[:], self.expected[:] = barrier, expected
        else:
            self.has_ended = True
        if self._failed is not None:
            self._vain, self._failed = self._failed, None

    def _run_some(self, here, ready):
        mask = ready & (self._blocks == here)
        if mask.all():
            self.block, self._blocks = here, None
            return
        self.launch.kernel.function(here, True)(self, self.registers, mask)
        kind, rest, value = self._end(here)
        if kind == "jump":
            self._blocks[mask] = rest[0]
        elif kind == "branch":
            self._blocks[mask] = np.where(value, *rest)[mask]
        elif kind == "switch":
            self._blocks[mask] = np.array(rest)[value[mask]]
        elif kind == "barrier":
            warps = self.whole_warps(mask, "bar.sync")
            following, self.barrier[warps], expected = rest
            self.expected[warps] = expected or self.launch.kernel.program.threads
            self._blocks[mask] = following
        else:
            self._blocks[mask] = -1
            self.has_ended = bool((self._blocks < 0).all())
        if self._failed is not None:
            self._vain, self._failed = self._vain | self._failed, None

    def whole_warps(self, m, where):
        """The warps that take part, each with all its lanes."""
        if m is None:
            return np.ones(self.width // LANES, dtype=bool)
        lanes = m.reshape(-1, LANES)
        if (lanes.any(1) != lanes[:, 0]).any() or (lanes.all(1) != lanes[:, 0]).any():
            raise Fault(f"{where if isinstance(where, str) else f'line {where}'}: a part of a warp")
        return lanes[:, 0]

    def all_lanes(self, lanes, line):
        if (lanes != 0xFFFFFFFF).any():
            raise Unsupported(f"line {line}: parts of a warp")

    def note(self, text: str) -> None:
        """Something that the manual leaves undefined, and that shows in the results if it matters."""

    def met(self, groups: list) -> None:
        """Called where warps of these have met at a barrier."""

    # values

    def full(self, value):
        return np.full(self.width, value)

    def parameter(self, offset, kind):
        key = offset, kind
        if key not in self._parameters:
            raw = self.launch.parameters[offset : offset + np.dtype(kind).itemsize]
            self._parameters[key] = self.full(np.frombuffer(raw, dtype=kind)[0])
        return self._parameters[key]

    def parameter_at(self, addresses, kind, m):
        """The one that each thread has chosen."""
        offsets = addresses.astype(np.int64) & 0xFFFFFFFF
        offsets = offsets if m is None else np.where(m, offsets, 0)
        raw = np.frombuffer(self.launch.parameters, dtype=np.uint8)
        return raw[offsets[:, None] + np.arange(np.dtype(kind).itemsize)].view(kind).reshape(-1)
