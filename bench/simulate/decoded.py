"""What the timing needs of each instruction, decoded once a kernel."""

import re
from dataclasses import dataclass

from bench.simulate.disassembly import Instruction
from bench.simulate.operands import address, guard_of, registers_of, value
from bench.simulate.program import Program

PHASES = ("prologue", "loop", "epilogue")
_FORMS = (  # of instructions that a kernel waits by, copies by or leaves its path by
    ("wgmma wait", r"WARPGROUP\.DEPBAR\.LE"),
    ("try wait", r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT"),
    ("barrier init", r"SYNCS\.EXCH\.64"),
    ("arrive", r"SYNCS\.ARRIVE\.TRANS64(\.RED)?(\.A1T0)?"),
    ("load", r"UTMALDG\.[1-5]D"),
    ("store", r"UTMASTG\.[1-5]D"),
    ("commit", r"UTMACMDFLUSH|LDGDEPBAR"),
    ("copy", r"LDGSTS.*"),
    ("copy wait", r"DEPBAR\.LE"),
    ("barrier", r"BAR\.SYNC\.DEFER_BLOCKING"),
    ("branch", r"BRA(\.U)?|CALL\.REL\.NOINC"),
    ("return", r"RET\.REL\.NODEC"),
    ("exit", r"EXIT"),
    # lanes do not part here; descriptors and barriers that end need no time
    ("plain", r"BRA\.DIV|SYNCS\.CCTL\.IV|UTMACCTL\.(PF|IV)"),
    ("unknown", r"(SYNCS|BAR|BRX|JMX|JMP|BRA|UTMA|UBLK|UCGABAR|CALL|RET|[HIQ]MMA|[QIB]GMMA|LDL|STL|USETMAXREG).*"),
)
# by its first letters: what `--explain` calls an instruction, and the field of Machine until its scoreboard is released
_GROUPS = (
    ("SHFL", "shuffle", "shuffle"), ("LDGSTS", "global memory", "variable"), ("LDG", "global memory", "global_load"),
    ("STG", "global memory", "variable"), ("LDS", "shared memory", "shared_load"),
    ("STS", "shared memory", "variable"), ("SYNCS", "synchronization", "trywait"),
    ("BAR", "synchronization", "variable"), ("FENCE", "synchronization", "variable"),
    ("MEMBAR", "synchronization", "variable"), ("MUFU", "float", "special"), ("F2I", "float", "special"),
    ("F", "float", "variable"), ("HGMMA", "wgmma", "variable"), ("H", "float", "variable"),
    ("I2F", "integer", "special"), ("UTMA", "TMA", "variable"), ("DEPBAR", "TMA", "variable"),
    ("WARPGROUP", "wgmma", "variable"),
    ("LDC", "constants", "constant"), ("ULDC", "constants", "constant"), ("S2", "constants", "system_register"),
    ("CS2R", "constants", "system_register"), ("", "integer", "variable"),
)  # fmt: skip


@dataclass
class Decoded:
    ins: Instruction
    kind: str  # of _FORMS, "wgmma", or "plain"
    phase: int  # of PHASES
    group: str  # what `--explain` calls it
    latency: str
    where: tuple = ()  # addresses and counts: expressions, compiled
    target: int = 0  # of a branch
    count: int = 0  # of groups that a wait leaves
    columns: int = 0  # of a wgmma
    left_bytes: int = 0  # of its left operand in shared memory
    written: int = 0  # bytes that a warp stores by pointers
    follows: bool = False  # something depends on what it computes


class Code:
    """A kernel's instructions."""

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]):
        self.labels = labels
        loop = main_loop(instructions, self.labels)
        self.decoded = [
            self._decode(ins, 0 if index < loop.start else 1 if index < loop.stop else 2)
            for index, ins in enumerate(instructions)
        ]
        roots = set()
        for item in self.decoded:
            if item.kind != "plain" or item.written:
                roots |= registers_of(" ".join(item.where)) | {guard_of(item.ins.guard)}
        self.program = Program(instructions, roots - {None})
        for index, item in enumerate(self.decoded):
            item.follows = index in self.program.effects
            item.where = tuple(compile(expression, "operand", "eval") for expression in item.where)

    def _decode(self, ins, phase):
        op, ops = ins.op, ins.operands
        kind = "wgmma" if ins.is_wgmma else next((k for k, form in _FORMS if re.fullmatch(form, op)), "plain")
        group, latency = next(names for start, *names in _GROUPS if op.startswith(start))
        found = Decoded(ins, kind, phase, group, latency)
        if kind == "wgmma":
            found.columns = int(re.match(r"HGMMA\.64x(\d+)x", op)[1])
            found.left_bytes = 0 if ops[1].startswith("R") else 2048
        elif kind == "copy wait" and len(ops) != 2:
            found.kind = "plain"  # for scoreboards
        elif kind in ("wgmma wait", "copy wait"):
            found.count = int(ops[-1], 16)
        elif kind in ("try wait", "barrier init"):
            found.where = address(ops[1]), value(ops[2])
        elif kind == "arrive":  # and so many bytes to come
            found.where = address(ops[1]), "0" if op.endswith("A1T0") else value(ops[2])
        elif kind in ("load", "store"):
            # registers that follow each other: for a load the barrier, and for both where the box is
            first, descriptor = (int(re.search(r"UR(\d+)", part)[1]) for part in ops)
            corner = first + (2 if kind == "load" else 1)
            barrier = (f"U[{first + 1}]",) if kind == "load" else ()
            found.where = f"U[{descriptor}]", *(f"signed(U[{corner + d}])" for d in range(int(op[-2]))), *barrier
        elif kind == "branch" and ins.label in self.labels:
            found.target = self.labels[ins.label]
        elif kind == "branch" or (kind == "barrier" and ops != ("0x0",)):
            found.kind = "unknown"
        elif kind == "return":
            found.where = (f"{value(ops[0].split()[0])}>>4",)
        elif op.startswith("STG"):
            width = re.search(r"\.(64|128)$", op)
            found.written = 32 * (int(width[1]) // 8 if width else 4)
        return found

    def leads_to_call(self, index: int) -> bool:
        """Whether a call stands in the straight line from there."""
        for item in self.decoded[index:]:
            if item.ins.op.startswith("CALL"):
                return True
            if item.ins.op.startswith(("BRA", "EXIT", "RET", "BSYNC")):
                return False
        return False


def main_loop(instructions: list[Instruction], labels: dict[str, int]) -> range:
    """The smallest of the loops that hold the most products, by position; all products where there is none."""
    products = [index for index, ins in enumerate(instructions) if ins.is_wgmma]
    best, rank = range(products[0], products[-1] + 1) if products else range(0), (0, 0)
    for index, ins in enumerate(instructions):
        if ins.op.startswith("BRA") and ins.label:
            body = range(labels.get(ins.label, index + 1), index + 1)
            inside = sum(at in body for at in products)
            # what stands behind the end returns into the kernel: waits that took long
            ends = any(instructions[at].op == "EXIT" and not instructions[at].guard for at in body)
            if inside and not ends and (inside, -len(body)) > rank:
                best, rank = body, (inside, -len(body))
    return best
