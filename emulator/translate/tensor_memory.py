"""PTX ISA 9.0, 9.7.16: tcgen05, products whose sums lie in tensor memory."""

import re

from emulator.ptx import Instruction

from .code import instruction
from .memory import vector

COMMIT = ("cta_group::1", "mbarrier::arrive::one")
COMMITS = ((*COMMIT, "b64"), (*COMMIT, "shared::cluster", "b64"))  # a program is a cluster here


def with_early_waits(body: list[Instruction]) -> list[Instruction]:
    """A block's instructions, with one more tcgen05.wait::ld ahead of each that uses its registers too early.

    The manual leaves them undefined before the wait, and Triton 3.6 and 3.9 let LLVM move conversions ahead of it: to
    ptxas they are registers like any other, which the conversion waits for. A wait that is missing stays missing.
    """
    ordered: list[Instruction] = []
    loaded: set[str] = set()  # and neither waited for nor used
    early: list[int] = []  # where they are used
    for i in body:
        what = i.modifiers[0] if i.name == "tcgen05" else ""
        if what == "wait::ld":
            for place in reversed(early):
                ordered.insert(place, i)
            loaded, early = set(), []
        elif loaded and loaded & set(re.findall(r"%\w+", i.text)):
            loaded = set()
            early.append(len(ordered))
        if what == "ld":
            loaded |= {register for o in i.operands if isinstance(o, tuple) for register in o}
        ordered.append(i)
    return ordered


@instruction("tcgen05")
def tcgen05(code, i):
    what, modifiers, condition = i.modifiers[0], i.modifiers[1:], code.condition(i)
    if what in ("alloc", "dealloc") and modifiers[:3] == ("cta_group::1", "sync", "aligned"):
        address = code.address(i.operands[0], 32) if what == "alloc" else code.full(i.operands[0], "u32")
        method = "sums_take" if what == "alloc" else "sums_give_back"
        code.emit(f"T.{method}({address}, {int(i.operands[1], 0)}, {condition}, {i.line})")
    elif what in ("ld", "st") and modifiers[-1] == "b32" and modifiers[:2] == ("sync", "aligned"):
        copy(code, i, what, modifiers[2:-1])
    elif what in ("wait::ld", "wait::st"):
        code.whole_warps(i)
        code.emit(f"T.sums_wait('{what[-2:]}')")
    elif what == "mma" and len(modifiers) == 2 and modifiers[0] == "cta_group::1" and len(i.operands) == 5:
        sums, a, b, description, adds = i.operands
        operands = code.address(sums, 32), code.full(a, "u64"), code.full(b, "u64"), code.full(description, "u32")
        adds = code.source(adds, "pred")
        code.emit(f"T.sums_product({', '.join(operands)}, {adds}, '{modifiers[1]}', {condition}, {i.line})")
    elif what == "commit" and modifiers in COMMITS:
        code.emit(f"T.sums_commit({code.address(i.operands[0], 32)}, {condition}, {i.line})")
    elif what not in ("relinquish_alloc_permit", "fence::before_thread_sync", "fence::after_thread_sync"):
        raise i.refused()


def copy(code, i, what, modifiers):
    """{registers}, [address], or the other way round; where the warp's halves differ, how far apart they are."""
    shape, count = modifiers
    address, *split = [o for o in i.operands if not isinstance(o, tuple)]
    registers = next(o for o in i.operands if isinstance(o, tuple))
    if int(count[1:]) != len(registers) or len(split) != (shape == "16x32bx2"):
        raise i.refused()
    place = f"{code.address(address, 32)}"
    rest = f"'{shape}', {int(split[0], 0) if split else 0}, {code.condition(i)}, {i.line}"
    if what == "ld":
        code.emit(f"T.sums_load({[code.index(o) for o in registers]}, {place}, {rest})")
    else:
        values = ", ".join(code.full(o, "u32") for o in vector(registers))
        code.emit(f"T.sums_store({place}, [{values}], {rest})")
