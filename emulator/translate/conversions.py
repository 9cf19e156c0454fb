"""PTX ISA 9.0, 9.7.9: mov, cvt, cvta."""

from .code import dtype_of, instruction, named


@instruction("mov")
def mov(code, i):
    kind = code.known(i)
    target, source = i.operands
    if isinstance(target, tuple):
        half = {"b32": 16, "b64": 32}[kind]
        low, high = target
        value = code.source(source, f"u{2 * half}")
        shift = code.constant(dtype_of(f"u{2 * half}")(half))
        code.write(i, low, f"{value}.astype(np.uint{half})", f"u{half}")
        code.write(i, high, f"({value} >> {shift}).astype(np.uint{half})", f"u{half}")
    elif isinstance(source, tuple):
        half = {"b32": 16, "b64": 32}[kind]
        low, high = (code.full(o, f"u{half}") for o in source)
        shift = code.constant(dtype_of(f"u{2 * half}")(half))
        code.write(i, target, f"({high}.astype(np.uint{2 * half}) << {shift}) | {low}", f"u{2 * half}")
    else:
        code.write(i, target, code.full(source, kind), kind if kind == "pred" else f"b{kind[1:]}")


@instruction("cvta")
def cvta(code, i):
    code.write(i, i.operands[0], code.full(i.operands[1], "u64"), "u64")  # one address space for all


ROUNDED = {"bf16": "to_bf16", "f16": "to_f16"}  # from f32, to nearest


@instruction("cvt")
def cvt(code, i):
    *how, target, source = i.modifiers
    register, *values = i.operands
    if source == "f32" and target in ("bf16x2", "f16x2"):
        nearest(i, how)
        high, low = (f"{ROUNDED[target[:-2]]}({code.full(o, 'f32')})" for o in values)
        code.write(i, register, f"pair({high}, {low})", "u32")
    elif source == "f32" and target in ROUNDED:
        nearest(i, how)
        code.write(i, register, f"{ROUNDED[target]}({code.full(values[0], 'f32')})", "u16")
    elif (target, source) == ("f32", "bf16"):
        code.write(i, register, f"from_bf16({code.full(values[0], 'u16')})", "f32")
    elif target == "tf32" and how == ["rna"]:
        code.write(i, register, f"to_tf32({code.full(values[0], 'f32')})", "u32")
    elif "f" in source and target[0] in "su" and how in (["rzi"], ["rzi", "ftz"]):
        kind = named(dtype_of(target))
        code.write(i, register, f"to_integer({code.full(values[0], source)}, {kind})", target)
    elif "b" in target + source or "tf32" in (target, source) or (source[0] == "f" and target[0] != "f"):
        raise i.refused()
    else:
        if target[0] == "f" and (source[0] in "su" or source > target):
            nearest(i, how)
        elif how:
            raise i.refused(f"{', '.join(how)} is not known")
        code.write(i, register, f"{code.full(values[0], source)}.astype({named(dtype_of(target))})", target)


def nearest(i, how):
    if how != ["rn"]:
        raise i.refused("rounds to nearest alone")
