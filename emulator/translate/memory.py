"""PTX ISA 9.0, 9.7.9 (ld, st) and 9.7.14 (ldmatrix, stmatrix)."""

import re

from .code import bits_of, dtype_of, instruction, named

WIDTHS = {"global": 64, "shared": 32}  # of an address


def vector(operand):
    return operand if isinstance(operand, tuple) else (operand,)


def space_of(i, *known):
    """The state space, where every other modifier is known, or says how caches should behave."""
    space = next((m.split("::")[0] for m in i.modifiers if m.split("::")[0] in ("param", *WIDTHS)), None)
    known = ("v2", "v4", space, f"{space}::cta", *known)
    if space is None or any(m not in known and not m.startswith(("L1::", "L2::")) for m in i.modifiers[:-1]):
        raise i.refused()
    return space


@instruction("ld")
def ld(code, i):
    kind = i.modifiers[-1]
    space = space_of(i, "nc", "relaxed", "acquire", "gpu")
    targets = vector(i.operands[0])
    if space == "param":
        name, offset = re.match(r"([%\w]+)(?:\s*\+\s*(\d+))?$", i.operands[1][0]).groups()
        dtype = named(dtype_of(kind))
        if code.is_register(name):
            address = code.address(i.operands[1], code.program.registers[name][1])
            value = f"T.parameter_at({address}, {dtype}, {code.condition(i)})"
        else:
            value = f"T.parameter({code.program.parameters[name][0] + int(offset or 0)}, {dtype})"
        code.write(i, targets[0], value, kind)
        return
    address = code.address(i.operands[1], WIDTHS[space])
    size = bits_of(kind) // 8
    code.emit(f"v = T.load_{space}({address}, {len(targets)}, {size}, {code.condition(i)}, {i.line})")
    for part, target in enumerate(targets):
        view = "" if kind[0] in "ub" else f".view({named(dtype_of(kind))})"
        code.write(i, target, f"v[{part}]{view}", kind)


@instruction("st")
def st(code, i):
    size = bits_of(i.modifiers[-1]) // 8
    space = space_of(i, "relaxed", "release", "gpu")
    if space == "param":
        raise i.refused()
    values = ", ".join(code.full(o, f"u{8 * size}") for o in vector(i.operands[1]))
    address = code.address(i.operands[0], WIDTHS[space])
    code.emit(f"T.store_{space}({address}, [{values}], {size}, {code.condition(i)}, {i.line})")


def is_transposed(i):
    if i.modifiers[:3] != ("sync", "aligned", "m8n8") or i.modifiers[-1] != "b16":
        raise i.refused()
    return "trans" in i.modifiers


@instruction("ldmatrix")
def ldmatrix(code, i):
    targets = vector(i.operands[0])
    code.whole_warps(i)
    address = code.address(i.operands[1], 32)
    code.emit(f"v = T.load_matrix({address}, {len(targets)}, {is_transposed(i)}, {code.condition(i)}, {i.line})")
    for part, target in enumerate(targets):
        code.write(i, target, f"v[{part}]", "u32")


@instruction("stmatrix")
def stmatrix(code, i):
    code.whole_warps(i)
    values = ", ".join(code.full(o, "u32") for o in vector(i.operands[1]))
    address = code.address(i.operands[0], 32)
    code.emit(f"T.store_matrix({address}, [{values}], {is_transposed(i)}, {code.condition(i)}, {i.line})")
