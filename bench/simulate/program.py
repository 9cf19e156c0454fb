"""Runs the integers and predicates of one lane: of all instructions those that what is modelled depends on."""

import re
import struct
from collections import defaultdict

from bench.simulate.disassembly import CannotModel, Instruction
from bench.simulate.operands import FUNCTIONS, M, guard_of, register, registers_of
from bench.simulate.semantics import assignments

Register = tuple[str, int]
# of computing with what is not followed, and of numbers that only such a computation gives
_NOT_FOLLOWED = (TypeError, KeyError, ValueError, ZeroDivisionError, OverflowError, struct.error)
_STORES = ("ST", "UTMA", "SYNCS", "BAR", "BRA", "RED", "EXIT", "CALL", "RET", "LDGSTS")


class Partial:
    """An integer of which some bits are not known, as where predicates are packed and one of them is of a float."""

    def __init__(self, known: int, unknown: int):
        self.known, self.unknown = known & ~unknown, unknown

    def __and__(self, other: int):
        return _partial(self.known & other, self.unknown & other)

    def __or__(self, other: int):
        return _partial(self.known | other, self.unknown & ~other)

    def __ne__(self, other):
        if other == 0 and self.known:
            return True
        raise TypeError("not known")

    def __eq__(self, other):
        return not self != other

    __hash__ = None
    __rand__, __ror__ = __and__, __or__


UNKNOWN = Partial(0, M)


def _partial(known, unknown):
    if isinstance(unknown, Partial):
        raise TypeError("of two that are not known")
    return Partial(known, unknown) if unknown else known


def either(a, b):
    """What is known of an integer that is one of two."""
    (a, of_a), (b, of_b) = ((x.known, x.unknown) if isinstance(x, Partial) else (x, 0) for x in (a, b))
    return _partial(a, of_a | of_b | a ^ b)


class Program:
    """A function for each instruction that something depends on.

    `roots` are the registers that branches, barriers and copies read. `effects` has False for an instruction whose
    results are not followed; `outputs` the registers that each instruction may write.
    """

    def __init__(self, instructions: list[Instruction], roots: set[Register]):
        meanings = [assignments(ins) for ins in instructions]
        self.outputs = [
            _written(ins) if meaning is None else [_parsed(target) for target, _ in meaning if target != "_"]
            for ins, meaning in zip(instructions, meanings, strict=True)
        ]
        needed = self._needed(instructions, meanings, roots)
        source, scope = [], dict(FUNCTIONS)
        for index in needed:
            if meanings[index]:
                targets, expressions = zip(*meanings[index], strict=True)
                source.append(f"def f{index}(R,U,P,Q,C,X):\n {','.join(targets)}={','.join(expressions)}")
        exec("\n".join(source), scope)
        self.effects = {index: scope.get(f"f{index}", False) for index in needed}

    def _needed(self, instructions, meanings, roots) -> set[int]:
        """Instructions that write what is needed, whatever their place."""
        writers = defaultdict(list)
        for index, outputs in enumerate(self.outputs):
            for output in outputs:
                writers[output].append(index)
        needed, waiting = set(), list(roots)
        while waiting:
            for index in writers.pop(waiting.pop(), ()):
                if index not in needed:
                    needed.add(index)
                    waiting += registers_of(",".join(expression for _, expression in meanings[index] or ()))
                    waiting.append(guard_of(instructions[index].guard))
        return needed


def _parsed(target) -> Register:
    return target[0], int(target[2:-1])


def _written(ins) -> list[Register]:
    """The registers that an instruction may write whose results are not followed."""
    if ins.op.startswith(_STORES):
        return []
    width = 2 if "WIDE" in ins.op or ins.op == "CS2R" else 1
    if ins.is_wgmma:
        width = int(re.match(r"HGMMA\.\d+x(\d+)", ins.op)[1]) // 2
    elif match := re.search(r"\.(64|128)\b|LDSM.*\.(\d)", ins.op):
        width = int(match[2] or int(match[1]) // 32)
    written: list[Register] = []
    for token in ins.operands[:2] if "SETP" in ins.op or "PLOP3" in ins.op else ins.operands[:3]:
        if found := register(token):
            file, index = found
            written += [(file, index + i) for i in range(width if file in "RU" else 1)]
            if file in "RU":
                break
        elif token not in ("PT", "UPT", "RZ", "URZ"):
            break
    return written


class Warp:
    """Registers of one warp's first lane, in a CTA that has an `index`."""

    def __init__(self, cta, first_thread: int, constants: dict):
        self.cta, self.first_thread, self.constants = cta, first_thread, constants
        self.files = {"R": [UNKNOWN] * 260, "U": [UNKNOWN] * 68, "P": [None] * 8, "Q": [None] * 8}

    def special(self, name):
        if name == "SR_TID.X":
            return self.first_thread
        if name == "SR_CTAID.X":
            return self.cta.index
        # one CTA a cluster, one dimension
        return 0 if name in ("SR_CgaCtaId", "SR_LANEID", "SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z") else None

    def holds(self, guard: str) -> bool | None:
        """Whether a guard lets the instruction run; None: it depends on tensors' contents."""
        if not (found := guard_of(guard)):
            return not guard.startswith("!")
        bit = self.files[found[0]][found[1]]
        return None if bit is None else bool(bit) != guard.startswith("!")

    def run(self, program: Program, index: int, guard: str) -> None:
        """An instruction that something depends on."""
        runs = self.holds(guard)
        if runs is False:
            return
        outputs = program.outputs[index]
        before = [self.files[file][place] for file, place in outputs]
        try:
            if not program.effects[index]:
                raise KeyError
            program.effects[index](*self.files.values(), self.constants, self)
        except _NOT_FOLLOWED:
            for file, place in outputs:
                self.files[file][place] = UNKNOWN if file in "RU" else None
        if runs is None:
            for (file, place), old in zip(outputs, before, strict=True):
                new = self.files[file][place]
                self.files[file][place] = either(old, new) if file in "RU" else old if old == new else None

    def read(self, expression) -> int:
        """The value of a compiled expression; CannotModel where it is not known."""
        try:
            return eval(expression, FUNCTIONS, {**self.files, "C": self.constants}) + 0
        except _NOT_FOLLOWED:
            raise CannotModel("an address or a count depends on what is not followed") from None
