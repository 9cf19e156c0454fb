"""What the instructions compute that branches, barriers and copies may depend on, for the first lane of a warp."""

from collections.abc import Callable
from itertools import takewhile

from bench.simulate.disassembly import Instruction
from bench.simulate.operands import PREDICATE, M, name, pair, predicate, value

Assignments = list[tuple[str, str]]  # registers and expressions, all of which are read before any is written

_COMPARE = {"EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">="}
_JOIN = {"AND": "&", "OR": "|", "XOR": "^"}
# what they change is not modelled, or is elsewhere
_INERT = {
    "NOP", "BSSY", "BSYNC", "WARPSYNC", "FENCE", "MEMBAR", "ERRBAR", "CCTL", "LDGDEPBAR", "STG", "STS", "STSM",
    "DEPBAR", "WARPGROUP", "UTMACMDFLUSH", "UTMACCTL", "ACQBULK", "PREEXIT",
}  # fmt: skip
_LOGIC = {0xC0: "{0}&{1}", 0xFC: "{0}|{1}", 0x3C: "{0}^{1}", 0x33: "{1}^M", 0xF8: "{0}|{1}&{2}"}


def assignments(ins: Instruction) -> Assignments | None:
    """What the instruction writes; None where its results are not followed."""
    op, *flags = ins.op.split(".")
    if op.startswith("U") and op[1:] in _ARITHMETIC | _OTHERS:  # of the uniform registers
        op = op[1:]
    if op in _INERT:
        return []
    try:
        if ins.op in _DIVISION:
            return [(name(ins.operands[0]), _DIVISION[ins.op].format(value(ins.operands[1])))]
        if op in _OTHERS:
            return _OTHERS[op](list(ins.operands), flags)
        if op in _ARITHMETIC:
            return _arithmetic(op, list(ins.operands), flags)
    except (KeyError, IndexError, ValueError, TypeError):  # a form of it that is not known
        pass
    return None


def _arithmetic(op, ops, flags):
    outs = list(takewhile(PREDICATE.fullmatch, ops))
    target, *ops = ops[len(outs) :]
    carries = list(takewhile(PREDICATE.fullmatch, ops)) if op in ("IADD3", "LEA", "IMAD") else []
    expression = _ARITHMETIC[op](ops[len(carries) :], flags)
    if "WIDE" in flags or "64" in flags:
        return _wide(target, expression)
    found = [(name(target) or "_", f"(t:={expression})&M")]
    tested = "int(t&M!=0)" if op == "LOP3" else "int(t>>32!=0)"
    return found + [(place, tested) for out in outs + carries if (place := name(out))]


def _wide(target, expression) -> Assignments:
    place = name(target)
    if place is None:
        return []
    file, index = place[0], int(place[2:-1])
    return [(place, f"(t:={expression})&M"), (f"{file}[{index + 1}]", "t>>32&M")]


def _number_of(flags):
    return "({}&M)" if "U32" in flags else "signed({})"


def _add(ops, flags):
    if "64" in flags:
        return "+".join(map(pair, ops[:3]))
    return "+".join([*map(value, ops[:3]), *(map(predicate, ops[3:]) if "X" in flags else ())])


def _multiply_add(ops, flags):
    if "MOV" in flags:
        return value(ops[2])
    if "WIDE" in flags or "HI" in flags:
        a, b = (_number_of(flags).format(value(token)) for token in ops[:2])
        return f"{a}*{b}+{pair(ops[2])}" + (">>32" if "HI" in flags else "")
    carry = f"+{predicate(ops[3])}" if "X" in flags else ""
    return f"{value(ops[0])}*{value(ops[1])}+{value(ops[2])}" + carry


def _shift_add(ops, flags):
    a, b = f"({value(ops[0])}&M)", value(ops[1])
    carry = f"+{predicate(ops[-1])}" if "X" in flags else ""
    if "SX32" in flags:
        return f"(signed({a})>>{32 - int(ops[2], 0)})+{b}{carry}"
    if "HI" in flags:
        return f"((({a}|({value(ops[2])}&M)<<32)<<{int(ops[3], 0)}>>32)&M)+{b}{carry}"
    return f"(({a}<<{int(ops[2], 0)})&M)+{b}{carry}"


def _logic(ops, _flags):
    a, b, c = map(value, ops[:3])
    table = int(ops[3], 16)
    return f"({_LOGIC[table].format(a, b, c)})" if table in _LOGIC else f"lut3({a},{b},{c},{table})"


def _select(ops, _flags):
    # + 0: a predicate that is not followed must not count as false
    return f"({value(ops[0])} if {predicate(ops[2])}+0 else {value(ops[1])})"


def _extreme(ops, flags):
    first = value(ops[0]) if len(ops) == 3 else f"{value(ops[0])}+{value(ops[1])}"
    a, b = _number_of(flags).format(first), _number_of(flags).format(value(ops[-2]))
    return f"(min({a},{b}) if {predicate(ops[-1])}+0 else max({a},{b}))"


def _shift(ops, flags):
    low, shift, high = value(ops[0]), f"min({value(ops[1])},64)", value(ops[2])
    both = f"(({low}&M)|({high}&M)<<32)"
    if flags[0] == "L":
        return f"({both}<<{shift}>>32)" if "HI" in flags else f"(({low})<<{shift})"
    if "HI" in flags:
        return f"({_number_of(['U32'] if 'S32' not in flags else []).format(high)}>>{shift})"
    return f"({both}>>{shift})"


# how integers are divided: by the reciprocal of a float that is not less
_DIVISION = {
    "I2F.RP": "rounded_up({}&M)",
    "I2F.U32.RP": "rounded_up({}&M)",
    "MUFU.RCP": "bits(1/number({}))",
    "F2I.FTZ.U32.TRUNC.NTZ": "int(number({}))",
}

# expressions of the result, before it is cut to its bits
_ARITHMETIC: dict[str, Callable[[list[str], list[str]], str]] = {
    "IADD3": _add,
    "VIADD": _add,
    "IMAD": _multiply_add,
    "LEA": _shift_add,
    "LOP3": _logic,
    "SEL": _select,
    "VIMNMX": _extreme,
    "VIADDMNMX": _extreme,
    "SHF": _shift,
    "MOV": lambda ops, _: value(ops[0]),
    "R2UR": lambda ops, _: value(ops[0]),
    "LDC": lambda ops, flags: pair(ops[0]) if "64" in flags else value(ops[0]),
    "SGXT": lambda ops, flags: f"extend({value(ops[0])},{value(ops[1])},{'U32' not in flags})",
    "PRMT": lambda ops, _: f"permute({value(ops[0])},{value(ops[1])},{value(ops[2])})",
    "IABS": lambda ops, _: f"abs(signed({value(ops[0])}))",
}


def _compare(ops, flags):
    """Two predicates: the condition and its opposite, each joined with the last operand."""
    if "EX" in flags:  # of 64 bits
        return None
    a, b = (_number_of(flags).format(value(token)) for token in ops[2:4])
    condition, join = f"int({a}{_COMPARE[flags[0]]}{b})", _JOIN[flags[-1]]
    pairs = zip(ops[:2], (condition, f"(1-{condition})"), strict=True)
    return [(place, f"{seen}{join}{predicate(ops[4])}") for out, seen in pairs if (place := name(out))]


def _look_up(ops, _flags):
    index = f"({predicate(ops[2])}<<2|{predicate(ops[3])}<<1|{predicate(ops[4])})"
    pairs = zip(ops[:2], ops[5:7], strict=True)
    return [(place, f"{int(table, 16)}>>{index}&1") for out, table in pairs if (place := name(out))]


def _vote(ops, _flags):
    return [(name(ops[0]), predicate(ops[1]))] if name(ops[0]) else None


def _pack_predicates(ops, _flags):
    file, mask = "Q" if ops[1] == "UPR" else "P", int(ops[3], 16)
    picked = "|".join(f"{file}[{i}]<<{i}" for i in range(7) if mask >> i & 1) or "0"
    return [(name(ops[0]), f"{value(ops[2])}&{M ^ mask}|{picked}")]


def _clear(ops, flags):
    if ops[1] != "SRZ":
        return None
    return [(name(ops[0]), "0")] if flags else _wide(ops[0], "0")


def _special(ops, _flags):
    return [(name(ops[0]), f"X.special({ops[1]!r})")]


_OTHERS: dict[str, Callable[[list[str], list[str]], Assignments | None]] = {
    "ISETP": _compare,
    "PLOP3": _look_up,
    "S2R": _special,
    "S2UR": _special,
    "CS2R": _clear,
    "ELECT": lambda ops, _: [(name(ops[0]), "1")],
    # a wait goes on when its phase is over
    "SYNCS": lambda ops, flags: [(name(ops[0]), "1")] if "TRYWAIT" in flags else [],
    "VOTE": _vote,
    "VOTEU": _vote,
    "P2R": _pack_predicates,
    "UP2UR": _pack_predicates,
}
