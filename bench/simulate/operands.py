"""Operands of instructions as Python expressions.

They are over the registers R and U (uniform), the predicates P and Q (uniform), the constant bank C and the warp X. A
register is an integer of 32 bits, a predicate 0 or 1. What is not followed raises TypeError where it is computed with:
None in a predicate, and in a register a `program.Partial`, of which single bits may be known.
"""

import re
import struct

M = 0xFFFFFFFF
_FILES = {"R": "R", "UR": "U", "P": "P", "UP": "Q"}
_NUMBER = re.compile(r"-?(0x[0-9a-f]+|\d+)")
PREDICATE = re.compile(r"!?U?P[\dT]+")


def register(token: str) -> tuple[str, int] | None:
    """("R", 5) of "R5"; None for what always reads as zero or true, and for what is no register."""
    match = re.fullmatch(r"(R|UR|P|UP)(\d+)", token)
    return (_FILES[match[1]], int(match[2])) if match else None


def registers_of(expression: str) -> set[tuple[str, int]]:
    """All that an expression reads."""
    return {(file, int(index)) for file, index in re.findall(r"\b([RUPQ])\[(\d+)\]", expression)}


def name(token: str) -> str | None:
    """R[5] of "R5"."""
    found = register(token)
    return f"{found[0]}[{found[1]}]" if found else None


def value(token: str) -> str:
    """32 bits, or 33 where a negation carries; KeyError for what is no operand of that kind."""
    if token.startswith("-") and not _NUMBER.fullmatch(token):
        return f"(({value(token[1:])}^M)+1)"
    if token.startswith("~"):
        return f"({value(token[1:])}^M)"
    if token in ("RZ", "URZ", "SRZ"):
        return "0"
    if _NUMBER.fullmatch(token):
        return str(int(token, 0) & M)
    if match := re.fullmatch(r"c\[0x0\]\[([^\]]+)\]", token):
        return f"C[{address(f'[{match[1]}]')}]"
    if found := name(token):
        return found
    raise KeyError(token)


def pair(token: str) -> str:
    """64 bits, of two registers."""
    if match := re.fullmatch(r"(-?)(U?R)(\d+)", token):
        file, index = _FILES[match[2]], int(match[3])
        return f"({match[1]}({file}[{index}]|{file}[{index + 1}]<<32))"
    if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", token):
        place = int(match[1], 16)
        return f"(C[{place}]|C[{place + 4}]<<32)"
    return str(int(token, 0)) if _NUMBER.fullmatch(token) else value(token)


def predicate(token: str) -> str:
    if token.startswith("!"):
        return f"(1-{predicate(token[1:])})"
    return "1" if token in ("PT", "UPT") else value(token)


def address(text: str) -> str:
    """Of `[R10+UR8+0x1000]`."""
    parts = re.search(r"\[([^\[\]]+)\]", text)[1].split("+")
    return "(" + "+".join(value(p) if "-" not in p else str(int(p, 0)) for p in parts if p) + ")&M"


def guard_of(guard: str) -> tuple[str, int] | None:
    """The predicate of a guard such as "!UP0"."""
    return register(guard.lstrip("!"))


def signed(x):
    return ((x & M) ^ 0x80000000) - 0x80000000


def bits(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def number(x):
    return struct.unpack("<f", struct.pack("<I", x & M))[0]


def rounded_up(x):
    found = bits(float(x))
    return found + 1 if number(found) < x else found


def permute(a, selector, c):
    source = (a & M) | (c & M) << 32
    result = 0
    for byte in range(4):
        nibble = selector >> 4 * byte & 0xF
        chosen = source >> 8 * (nibble & 7) & 0xFF
        if nibble & 8:
            chosen = 0xFF if chosen & 0x80 else 0
        result |= chosen << 8 * byte
    return result


def extend(x, width, is_signed):
    x &= (1 << width) - 1
    return (x ^ 1 << width - 1) - (1 << width - 1) if is_signed and width else x


def lut3(a, b, c, table):
    """Any function of three bits, for each bit."""
    result = 0
    for term in range(8):
        if table >> term & 1:
            result |= (a if term & 4 else ~a) & (b if term & 2 else ~b) & (c if term & 1 else ~c)
    return result & M


FUNCTIONS = {f.__name__: f for f in (signed, bits, number, rounded_up, permute, extend, lut3)} | {"M": M}
