"""The Python of one block, line by line: operands, results, and the instructions that are known.

In the code that is written `R` holds the registers, each an array of unsigned integers with an element for each thread
(of bools for predicates), `m` the threads that take part where not all do, and `T` the threads themselves
(`machine.threads`), which do what is more than arithmetic.
"""

import re
import struct
from collections.abc import Callable

import numpy as np

from emulator.ptx import Instruction, Program, Unsupported

from . import numbers

SHARED = 1024  # where dynamic shared memory begins: the bytes before are the system's on sm_90
PARAMETERS = 0x7000_0000_0000_0000  # where parameters lie, as an address

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}
SPECIAL = {"%tid.x": "T.tid", "%ctaid.x": "T.ctaid", "%nctaid.x": "T.nctaid", "%ntid.x": "T.ntid", "%laneid": "T.lane"}
ZERO = ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z")

INSTRUCTIONS: dict[str, Callable] = {}  # name: writes an instruction of that name, function(code, instruction)


def instruction(*names: str):
    """Registers a function for instructions of these names."""

    def register(function):
        INSTRUCTIONS.update(dict.fromkeys(names, function))
        return function

    return register


def bits_of(kind: str) -> int:
    return int(kind[1:])


def dtype_of(kind: str):
    """NumPy's type for a PTX type: "s32", "b16", "f32", "pred"."""
    if kind == "pred":
        return np.bool_
    types = {"f": FLOATS, "s": SIGNED}.get(kind[0], UNSIGNED)
    if bits_of(kind) not in types:
        raise Unsupported(f"the type {kind}")
    return types[bits_of(kind)]


def named(dtype) -> str:
    """The name that written code has for it."""
    return f"np.{np.dtype(dtype).name}"


class Code:
    """One block's code: `masked` where a part of the threads runs it."""

    def __init__(self, program: Program, masked: bool):
        self.program, self.masked = program, masked
        self._lines: list[str] = []
        self._constants: list = []

    def compile(self, name: str) -> Callable:
        """function(T, R, m)"""
        constants = "".join(f", K{i}=K{i}" for i in range(len(self._constants)))
        source = f"def block(T, R, m{constants}):\n" + "".join(f"    {line}\n" for line in self._lines or ["pass"])
        scope = {**vars(numbers), **{f"K{i}": value for i, value in enumerate(self._constants)}}
        exec(compile(source, f"<{name}>", "exec"), scope)
        return scope["block"]

    def emit(self, line: str) -> None:
        self._lines.append(line)

    def constant(self, value) -> str:
        self._constants.append(value)
        return f"K{len(self._constants) - 1}"

    # operands

    def is_register(self, operand: str) -> bool:
        return operand in self.program.registers

    def index(self, register: str) -> int:
        return self.program.registers[register][0]

    def source(self, operand: str, kind: str) -> str:
        """An operand as an array, or a scalar, of that type."""
        dtype = dtype_of(kind)
        if operand in self.program.registers:
            index, width = self.program.registers[operand]
            if kind == "pred":
                return f"R[{index}]"
            if bits_of(kind) > width:
                raise Unsupported(f"{operand}, of {width} bits, read as {kind}")
            value = f"R[{index}]"
            if bits_of(kind) < width:  # its lower part
                value = f"{value}.astype({named(UNSIGNED[bits_of(kind)])})"
        elif operand in SPECIAL:
            value = SPECIAL[operand]
        else:
            return self.constant(dtype(0) if operand in ZERO else self._immediate(operand, dtype))
        return value if kind[0] in "ub" else f"{value}.view({named(dtype)})"

    def full(self, operand: str, kind: str) -> str:
        """The same with an element for each thread."""
        value = self.source(operand, kind)
        return value if self.is_register(operand) or operand in SPECIAL else f"T.full({value})"

    def _immediate(self, operand, dtype):
        if dtype is np.bool_:
            return np.bool_(int(operand) != 0)
        if operand == "global_smem":
            return dtype(SHARED)
        if operand in self.program.parameters:
            # as a number of 32 bits it is the offset, as PARAMETERS has none of these set
            return dtype(PARAMETERS + self.program.parameters[operand][0] & (1 << 8 * dtype(0).itemsize) - 1)
        if found := re.match(r"0[fF]([0-9A-Fa-f]{8})$", operand):
            raw = bytes.fromhex(found.group(1))
            return (
                np.uint32(int(raw.hex(), 16)).view(dtype)
                if dtype(0).itemsize == 4
                else dtype(struct.unpack(">f", raw)[0])
            )
        if found := re.match(r"0[dD]([0-9A-Fa-f]{16})$", operand):
            return np.uint64(int(found.group(1), 16)).view(dtype)
        bits = 8 * dtype(0).itemsize
        return np.array([int(operand, 0) & (1 << bits) - 1], dtype=UNSIGNED[bits]).view(dtype)[0]

    def address(self, operand: list, width: int) -> str:
        """[register or symbol + offset], an element for each thread."""
        base, offset = re.match(r"([%\w$]+)\s*(?:\+\s*(-?\d+))?$", operand[0]).groups()
        value = self.full(base, f"u{width}")
        if offset and int(offset):
            value = f"({value} + {self.constant(UNSIGNED[width](int(offset) & (1 << width) - 1))})"
        return value

    def condition(self, i: Instruction) -> str:
        """The threads that run the instruction; "None" where all do."""
        parts = ["m"] if self.masked else []
        if i.predicate:
            parts.append(f"{'~' * i.negated}R[{self.index(i.predicate)}]")
        return " & ".join(parts) or "None"

    # results

    def write(self, i: Instruction, register: str, expression: str, kind: str) -> None:
        """An expression of that type to a register as wide or wider, which it is extended to."""
        if register == "_":
            return
        index, width = self.program.registers[register]
        if kind != "pred":
            if bits_of(kind) < width:
                kind = f"{kind[0]}{width}"
                expression = f"({expression}).astype({named(dtype_of(kind))})"
            if kind[0] not in "ub":
                expression = f"({expression}).view({named(UNSIGNED[width])})"
        if (condition := self.condition(i)) != "None":
            expression = f"np.where({condition}, {expression}, R[{index}])"
        self.emit(f"R[{index}] = {expression}")

    def whole_warps(self, i: Instruction) -> None:
        """For what all lanes of a warp do together."""
        if i.predicate:
            raise i.refused("under a predicate")
        if self.masked:
            self.emit(f"T.whole_warps(m, {i.line})")

    def known(self, i: Instruction, *modifiers: str) -> str:
        """The type, which comes last, where every other modifier is one of these."""
        if unknown := [m for m in i.modifiers[:-1] if m not in modifiers]:
            raise i.refused(f"{', '.join(unknown)} is not known")
        return i.modifiers[-1]
