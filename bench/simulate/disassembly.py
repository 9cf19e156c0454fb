"""Disassembly by the nvdisasm that Triton brings, with the control bits of each instruction."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
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


def disassemble(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """The kernel's instructions, and for each label which of them follows. CannotModel where there are none."""
    from triton import knobs

    instructions, labels = [], {}
    text = run_on(knobs.nvidia.nvdisasm.path, "-hex", cubin)
    for code in re.findall(r"^\s*\.section\s+\.text\..*?(?=^\s*\.section\s|\Z)", text, re.MULTILINE | re.DOTALL):
        lines = code.splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if match := re.match(r"\s*([.$\w]+):\s*$", line):
                labels[match[1]] = len(instructions)
            elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]+ \*/", line):
                instructions.append(decode(match[1], int(re.search(r"/\* (0x[0-9a-f]+) \*/", following)[1], 16)))
    if not instructions:
        raise CannotModel("nvdisasm shows no instruction")
    return instructions, labels


def run_on(tool: str, option: str, cubin: bytes) -> str:
    """What a tool of CUDA prints of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def decode(text: str, high: int) -> Instruction:
    """An instruction by its text, and by the higher 64 of its 128 bits: from bit 41 on they hold four bits of stall,
    one of yield, three and three of scoreboards that are set, and six of those that are waited for."""
    control = high >> 41
    guard = ""
    if match := re.match(r"@(!?U?P[\dT]+)\s+", text):
        guard, text = match[1], text[match.end() :]
    op, _, rest = text.partition(" ")
    operands = tuple(part.strip().replace(".reuse", "") for part in rest.split(",")) if rest else ()
    if op.startswith("BRA") and re.fullmatch(r"!?U?P[\dT]+", operands[0]):
        guard, op = operands[0], "BRA.GUARDED" if guard else op  # by two predicates
    return Instruction(
        text, op, guard, operands,
        stall=max(1, control & 0xF), sets=control >> 5 & 7, reads=control >> 8 & 7,
        waits=tuple(board for board in range(6) if control >> 11 + board & 1),
    )  # fmt: skip
