"""Blocks of PTX to Python functions over all threads that run together."""

from collections.abc import Callable

from emulator.ptx import Program, Unsupported

from . import (  # noqa: F401  each registers its instructions
    arithmetic,
    asynchronous,
    conversions,
    memory,
    products,
    tensor_memory,
    warps,
)
from .code import INSTRUCTIONS, Code


class Translator:
    """Functions (T, R, m) of a program's blocks, made when they first run: see `code`."""

    def __init__(self, program: Program):
        self._program = program
        self._made: dict[tuple[int, bool], Callable] = {}

    def function(self, block: int, masked: bool) -> Callable:
        key = block, masked
        if key not in self._made:
            self._made[key] = self._translated(block, masked)
        return self._made[key]

    def _translated(self, block, masked):
        code = Code(self._program, masked)
        for i in tensor_memory.with_early_waits(self._program.blocks[block].body):
            if i.name not in INSTRUCTIONS:
                raise i.refused("no such instruction is known")
            try:
                INSTRUCTIONS[i.name](code, i)
            except Unsupported as error:
                raise error if str(error).startswith("line ") else i.refused(str(error)) from None
            except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:  # a form nobody met yet
                raise i.refused(repr(error)) from error
        return code.compile(f"{self._program.name}, block {block}")
