"""What a multiprocessor holds while it runs: CTAs, their warp groups and mbarriers; and the launch that it is given."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from bench.simulate.decoded import Code
from bench.simulate.disassembly import CannotModel, disassemble
from bench.simulate.machine import Machine
from bench.simulate.program import Warp


@dataclass(frozen=True)
class Box:
    """What a descriptor says of a copy (TMA): sides of a box and of the tensor, the innermost last."""

    sides: tuple[int, ...]
    shape: tuple[int, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        return prod(self.sides) * self.itemsize

    def inside(self, corner) -> int:
        """Bytes of the box there that lie in the tensor: what moves. `corner` has the innermost first."""
        found = self.itemsize
        for side, length, at in zip(self.sides, self.shape, reversed(corner), strict=True):
            found *= max(0, min(at + side, length) - max(at, 0))
        return found


@dataclass
class Kernel:
    """A compiled kernel as one launch starts it."""

    name: str
    cubin: bytes
    programs: int
    warps: int
    registers: int  # of a thread
    shared: int  # bytes of a CTA
    constants: dict[int, int]  # words of the constant bank: the arguments
    descriptors: dict[int, Box]  # by their place in the constant bank

    @cached_property
    def code(self) -> Code:
        return Code(*disassemble(self.cubin))

    def residents(self, machine: Machine) -> int:
        """CTAs that an SM holds."""
        by_registers = machine.registers // (32 * self.warps * (-(-self.registers // 8) * 8))
        by_shared = machine.shared_bytes // (self.shared + 1024)
        found = min(by_registers, by_shared, machine.threads // (32 * self.warps), 32)
        if not found:
            raise CannotModel(f"a CTA of {self.registers} registers and {self.shared} bytes fits no multiprocessor")
        return found


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    expected: int
    left: int
    bytes: int = 0
    ready: float = 0.0
    ended: list[float] = field(default_factory=list)
    waiters: list[tuple[float, "Group"]] = field(default_factory=list)


class Cta:
    def __init__(self, index: int, slot: int, turn: int, warps: int):
        self.index, self.slot, self.turn = index, slot, turn
        self.barriers: dict[int, Barrier] = {}  # mbarriers, by address
        self.arrived: list[tuple[float, Group]] = []  # at the barrier
        self.live = warps
        self.first: Group | None = None


class Group:
    """A warp group: its four warps sit on the four schedulers and do the same at the same time."""

    def __init__(self, cta: Cta, warps: list[Warp]):
        self.cta, self.warps = cta, warps
        self.at = 0  # instruction
        self.ahead: dict[int, list[Warp]] = {}  # warps that a branch took to an instruction where the others follow
        self.boards = [0.0] * 6  # when each scoreboard is released
        self.setters = [0] * 6  # instruction that each waits for
        self.groups: list[float] = []  # ends of groups of products
        self.queue: list[float] = []  # starts of products
        self.commits: list[float] = []  # ends of groups of copies
        self.copying = 0.0
        self.passed = False  # the barrier at `at`
        self.seen: set[int] = set()
        self.spent: dict[tuple[int, str], float] = defaultdict(float)  # clocks by (phase, cause)
        self.counts: dict[tuple[int, str], int] = defaultdict(int)  # by (phase, kind of instruction)
