"""Disassembly by the nvdisasm that Triton brings, with the control bits of each instruction."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

NONE = 7  # stands for no scoreboard


class CannotModel(Exception):
    """A kernel does what the simulation does not know: no figure is better than a wrong one."""


@dataclass(frozen=True)
class Instruction:
    text: str  # without the guard
    op: str
    guard: str  # "P1", "!UP0", or ""
    operands: tuple[str, ...]
    stall: int  # clocks until the warp's next one
    sets: int  # scoreboard that is released with the result, or NONE
    reads: int  # likewise with its operands
    waits: tuple[int, ...]  # scoreboards that it waits for

    @property
    def is_wgmma(self) -> bool:
        return self.op.startswith("HGMMA")

    @property
    def label(self) -> str | None:
        """Where a branch goes to, where that is written out."""
        match = re.search(r"`\(([^)]+)\)", self.text)
        return match[1] if match else None


@dataclass
class Listing:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction that follows
    constants: dict[tuple[int, int], int] = field(default_factory=dict)  # words of the kernel's own, by (bank, place)


def disassemble(cubin: bytes) -> Listing:
    """The kernel's instructions. CannotModel where nvdisasm shows none."""
    from triton import knobs

    found = Listing()
    text = run_on(knobs.nvidia.nvdisasm.path, "-hex", cubin)
    for section in re.split(r"^\s*\.section\s+", text, flags=re.MULTILINE):
        if section.startswith(".text."):
            _read_code(section.splitlines(), found)
        elif match := re.match(r"\.nv\.constant([1-9]\d*)\.", section):
            rows = "".join(re.findall(r"\.byte\s+(.*)", section.replace("\n", ",\n")))
            data = bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]+)", rows))
            for place in range(0, len(data) - 3, 4):
                found.constants[int(match[1]), place] = int.from_bytes(data[place : place + 4], "little")
    if not found.instructions:
        raise CannotModel("nvdisasm shows no instruction")
    return found


def run_on(tool: str, option: str, cubin: bytes) -> str:
    """What a tool of CUDA prints of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _read_code(lines, found):
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if match := re.match(r"\s*([.$\w]+):\s*$", line):
            found.labels[match[1]] = len(found.instructions)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]+ \*/", line):
            high = int(re.search(r"/\* (0x[0-9a-f]+) \*/", following)[1], 16)
            found.instructions.append(decode(match[1], high))


def decode(text: str, high: int) -> Instruction:
    """An instruction by its text, and by the higher 64 of its 128 bits: from bit 41 on they hold four bits of stall,
    one of yield, three and three of scoreboards that are set, and six of those that are waited for."""
    control = high >> 41
    guard = ""
    if match := re.match(r"@(!?U?P[\dT]+)\s+", text):
        guard, text = match[1], text[match.end() :]
    op, _, rest = text.partition(" ")
    operands = tuple(part.strip().replace(".reuse", "") for part in rest.split(",")) if rest else ()
    if op.startswith("BRA") and len(operands) > 1 and re.fullmatch(r"!?U?P[\dT]+", operands[0]):
        if guard:
            op = "BRA.GUARDED"  # by two predicates
        guard = operands[0]
    return Instruction(
        text, op, guard, operands,
        stall=max(1, control & 0xF), sets=control >> 5 & 7, reads=control >> 8 & 7,
        waits=tuple(board for board in range(6) if control >> 11 + board & 1),
    )  # fmt: skip
