"""PTX ISA 9.0, 9.7.9 (shfl) and 9.7.13 (redux, elect): what the lanes of a warp do together."""

from .code import instruction

ALL_LANES = ("-1", "0xffffffff")


@instruction("shfl")
def shfl(code, i):
    _sync, mode, kind = i.modifiers
    target, value, amount, clamp, lanes = i.operands
    if "|" in target or lanes not in ALL_LANES:
        raise i.refused()
    code.whole_warps(i)
    amount, clamp = (code.source(o, "u32") for o in (amount, clamp))
    code.write(i, target, f"shuffle({code.source(value, kind)}, '{mode}', {amount}, {clamp})", kind)


@instruction("redux")
def redux(code, i):
    _sync, operation, kind = i.modifiers
    target, value, lanes = i.operands
    if code.is_register(lanes):
        code.emit(f"T.all_lanes({code.source(lanes, 'u32')}, {i.line})")
    elif lanes not in ALL_LANES:
        raise i.refused()
    code.whole_warps(i)
    function = {"add": "add", "min": "minimum", "max": "maximum", "and": "bitwise_and", "or": "bitwise_or",
                "xor": "bitwise_xor"}[operation]  # fmt: skip
    code.write(i, target, f"reduce_warp({code.source(value, kind)}, np.{function})", kind)


@instruction("elect")
def elect(code, i):
    leader, predicate = i.operands[0].split("|")
    if i.operands[1] not in ALL_LANES:
        raise i.refused()
    code.whole_warps(i)
    code.write(i, leader, "T.full(np.uint32(0))", "u32")
    code.write(i, predicate, "(T.lane == 0)", "pred")
