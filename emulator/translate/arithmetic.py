"""PTX ISA 9.0, 9.7.1 to 9.7.8: integers, floating point, halves, comparison and selection, logic and shifts."""

import numpy as np

from .code import bits_of, dtype_of, instruction

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
               "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip


def halves(code, operand, kind):
    """The lower and the upper half of an operand of type bf16x2 or f16x2, as numbers."""
    for shift in (0, 16):
        bits = f"({code.full(operand, 'u32')} >> {code.constant(np.uint32(shift))}).astype(np.uint16)"
        yield f"from_bf16({bits})" if kind == "bf16x2" else f"{bits}.view(np.float16)"


def binary(code, i, kind, form):
    """form, of {a} and {b}: a result of `kind`."""
    target, a, b = i.operands
    if kind == "bf16":
        a, b = (f"from_bf16({code.full(o, 'u16')})" for o in (a, b))
        code.write(i, target, f"to_bf16({form.format(a=a, b=b)})", "u16")
    elif kind in ("bf16x2", "f16x2"):
        parts = [form.format(a=x, b=y) for x, y in zip(halves(code, a, kind), halves(code, b, kind), strict=True)]
        low, high = (f"to_bf16({part})" if kind == "bf16x2" else f"({part}).view(np.uint16)" for part in parts)
        code.write(i, target, f"pair({high}, {low})", "u32")
    elif kind == "f32x2":
        code.write(i, target, f"({form.format(a=two_floats(code, a), b=two_floats(code, b))}).view(np.uint64)", "u64")
    else:
        code.write(i, target, form.format(a=code.source(a, kind), b=code.source(b, kind)), kind)


def two_floats(code, operand):
    """Both of every thread, one after the other."""
    return f"{code.full(operand, 'u64')}.view(np.float32)"


@instruction("add", "sub")
def add(code, i):
    # a sum of two bf16 is rounded twice, to fp32 first: 24 bits are more than twice 8, so that nothing changes
    binary(code, i, code.known(i, "rn"), {"add": "{a} + {b}", "sub": "{a} - {b}"}[i.name])


def wide_product(code, i, kind):
    wide = f"{kind[0]}{2 * bits_of(kind)}"
    a, b = (code.source(o, kind) for o in i.operands[1:3])
    return f"np.multiply({a}, {b}, dtype=np.{dtype_of(wide).__name__})", wide


@instruction("mul")
def mul(code, i):
    kind = code.known(i, "lo", "hi", "wide", "rn")
    if "wide" in i.modifiers:
        code.write(i, i.operands[0], *wide_product(code, i, kind))
    else:
        binary(code, i, kind, "high_half({a}, {b})" if "hi" in i.modifiers else "{a} * {b}")


@instruction("mad")
def mad(code, i):
    kind = code.known(i, "lo", "wide")
    if "wide" in i.modifiers:
        product, kind = wide_product(code, i, kind)
    else:
        product = " * ".join(code.source(o, kind) for o in i.operands[1:3])
    code.write(i, i.operands[0], f"{product} + {code.source(i.operands[3], kind)}", kind)


@instruction("fma")
def fma(code, i):
    kind = code.known(i, "rn")
    if kind == "f32":
        code.write(i, i.operands[0], f"fma({', '.join(code.source(o, kind) for o in i.operands[1:])})", kind)
    elif kind == "f32x2":
        terms = ", ".join(two_floats(code, o) for o in i.operands[1:])
        code.write(i, i.operands[0], f"fma({terms}).view(np.uint64)", "u64")
    elif kind in ("bf16x2", "f16x2"):
        terms = zip(*(halves(code, o, kind) for o in i.operands[1:]), strict=True)
        low, high = (f"to_{kind[:-2]}(fma({', '.join(part)}))" for part in terms)
        code.write(i, i.operands[0], f"pair({high}, {low})", "u32")
    else:
        raise i.refused()


@instruction("div")
def div(code, i):
    kind = code.known(i, "full", "rn", "approx")
    binary(code, i, kind, "{a} / {b}" if kind[0] == "f" else "divide({a}, {b})")


@instruction("rem")
def rem(code, i):
    binary(code, i, code.known(i), "remainder({a}, {b})")


@instruction("min", "max")
def extreme(code, i):
    kind = code.known(i, "NaN")
    passes_nan = "NaN" in i.modifiers or "f" not in kind  # without it the other operand is the result
    function = {"min": ("fmin", "minimum"), "max": ("fmax", "maximum")}[i.name][passes_nan]
    binary(code, i, kind, f"np.{function}({{a}}, {{b}})")


@instruction("and", "or", "xor")
def logic(code, i):
    binary(code, i, code.known(i), {"and": "{a} & {b}", "or": "{a} | {b}", "xor": "{a} ^ {b}"}[i.name])


@instruction("not", "neg", "abs", "sqrt", "ex2", "rcp", "rsqrt")
def unary(code, i):
    # what is approximate on a GPU is exact here: judge results by bounds that allow for it
    form = {"not": "~{}", "neg": "-{}", "abs": "np.abs({})", "sqrt": "np.sqrt({})", "ex2": "np.exp2({})",
            "rcp": "np.float32(1) / {}", "rsqrt": "np.float32(1) / np.sqrt({})"}[i.name]  # fmt: skip
    kind = code.known(i, *(("rn", "approx", "ftz") if i.name in ("sqrt", "ex2", "rcp", "rsqrt") else ()))
    code.write(i, i.operands[0], form.format(code.source(i.operands[1], kind)), kind)


@instruction("shl", "shr")
def shift(code, i):
    target, value, amount = i.operands
    kind = code.known(i)
    value = code.source(value, kind)
    function, sign = {"shl": ("shift_left", "<<"), "shr": ("shift_right", ">>")}[i.name]
    if code.is_register(amount) or int(amount) >= bits_of(kind):
        code.write(i, target, f"{function}({value}, {code.source(amount, 'u32')})", kind)
    else:
        code.write(i, target, f"{value} {sign} {code.constant(dtype_of(kind)(int(amount)))}", kind)


@instruction("bfe")
def bfe(code, i):
    kind = code.known(i)
    start, length = map(int, i.operands[2:])
    code.write(i, i.operands[0], f"bit_field({code.source(i.operands[1], kind)}, {start}, {length})", kind)


@instruction("prmt")
def prmt(code, i):
    """Bytes of two words, each chosen by four bits of a constant."""
    if i.modifiers != ("b32",) or code.is_register(i.operands[3]):
        raise i.refused()
    a, b = (code.full(o, "u32") for o in i.operands[1:3])
    code.write(i, i.operands[0], f"chosen_bytes({a}, {b}, {int(i.operands[3].rstrip('U'), 0)})", "u32")


@instruction("setp")
def setp(code, i):
    if len(i.modifiers) != 2:
        raise i.refused()
    comparison, kind = i.modifiers
    target, a, b = i.operands
    if kind in ("bf16x2", "f16x2"):  # the lower halves to one predicate, the upper ones to another
        pairs = zip(target.split("|"), halves(code, a, kind), halves(code, b, kind), strict=True)
        for register, x, y in pairs:
            code.write(i, register, f"({x} {COMPARISONS[comparison]} {y})", "pred")
        return
    if kind == "bf16":
        a, b = (f"from_bf16({code.full(o, 'u16')})" for o in (a, b))
    else:
        a, b = code.full(a, kind), code.source(b, kind)
    code.write(i, target, compared(comparison, a, b) if "f" in kind else f"{a} {COMPARISONS[comparison]} {b}", "pred")


def compared(comparison, a, b):
    """Floating point: an ordered comparison with NaN is false, an unordered one true."""
    nan = f"(np.isnan({a}) | np.isnan({b}))"
    if comparison in ("num", "nan"):
        return nan if comparison == "nan" else f"~{nan}"
    ordered = f"({a} {COMPARISONS[comparison.removesuffix('u')]} {b})"
    if comparison.endswith("u"):
        return f"({ordered} | {nan})"
    return f"({ordered} & ~{nan})" if comparison == "ne" else ordered


@instruction("selp")
def selp(code, i):
    kind = code.known(i)
    a, b = (code.source(o, kind) for o in i.operands[1:3])
    code.write(i, i.operands[0], f"np.where({code.source(i.operands[3], 'pred')}, {a}, {b})", kind)
