"""PTX ISA 9.0, 9.7.14 (mma.sync) and 9.7.15 (wgmma): the tensor cores."""

import re

from .code import instruction

KINDS = ("bf16", "f16", "tf32")


@instruction("wgmma")
def wgmma(code, i):
    code.whole_warps(i)
    what = i.modifiers[0]
    if what == "mma_async":
        mma_async(code, i)
    elif what == "commit_group":
        code.emit("T.product_commit()")
    elif what == "wait_group":
        code.emit(f"T.product_wait({int(i.operands[0])})")
    elif what != "fence":  # of registers, which are there at once
        raise i.refused()


def mma_async(code, i):
    """D, A (registers or a matrix descriptor), B (a descriptor), whether D is added to, signs, transpositions."""
    _, _, _, shape, sums, *kinds = i.modifiers
    size = re.match(r"m64n(\d+)k\d+$", shape)
    d, a, b, adds, *flags = i.operands
    flags = [int(flag) for flag in flags]
    if sums != "f32" or len(set(kinds)) > 1 or kinds[0] not in KINDS or size is None or flags[:2] != [1, 1]:
        raise i.refused()
    if isinstance(a, tuple):
        a_transposed, (b_transposed, *_) = 0, (*flags[2:], 0)
        a = f"[{', '.join(code.source(o, 'u32') for o in a)}]"
    else:
        a_transposed, b_transposed = flags[2:] or (0, 0)
        a = code.full(a, "u64")
    code.emit(
        f"T.product({[code.index(o) for o in d]}, {a}, {code.full(b, 'u64')}, {code.source(adds, 'pred')}, "
        f"'{kinds[0]}', {int(size.group(1))}, {a_transposed}, {b_transposed}, {code.condition(i)}, {i.line})"
    )


@instruction("mma")
def mma(code, i):
    """D, A, B and C of one warp, in registers: m16n8k16 of halves, m16n8k8 of tf32."""
    *how, shape, row, column, sums, kind, same, added = i.modifiers
    depth = {"bf16": 16, "f16": 16, "tf32": 8}.get(kind)
    if how != ["sync", "aligned"] or (row, column) != ("row", "col") or (sums, added) != ("f32", "f32"):
        raise i.refused()
    if kind != same or shape != f"m16n8k{depth}":
        raise i.refused()
    code.whole_warps(i)
    d, a, b, c = i.operands
    a, b, c = ("[" + ", ".join(code.full(o, "u32") for o in part) + "]" for part in (a, b, c))
    code.emit(f"v = multiply_fragments({a}, {b}, {c}, '{kind}')")
    for part, target in enumerate(d):
        code.write(i, target, f"v[{part}]", "u32")
