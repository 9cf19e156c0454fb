"""PTX ISA 9.0, 9.7.9 (cp.async, cp.async.bulk, TMA) and 9.7.13 (mbarrier, fence)."""

from .code import instruction


@instruction("mbarrier")
def mbarrier(code, i):
    what = i.modifiers[:2]
    condition = code.condition(i)
    if what[0] == "init":
        barrier, count = code.address(i.operands[0], 32), code.full(i.operands[1], "u32")
        code.emit(f"T.barrier_init({barrier}, {count}, {condition}, {i.line})")
    elif what[0] == "inval":
        code.emit(f"T.barrier_invalidate({code.address(i.operands[0], 32)}, {condition}, {i.line})")
    elif what[0] == "arrive" and i.operands[0] == "_":
        expects = what[1] == "expect_tx"
        if len(i.operands) != 2 + expects:
            raise i.refused()
        size = code.full(i.operands[2], "u32") if expects else "None"
        code.emit(f"T.barrier_arrive({code.address(i.operands[1], 32)}, {size}, {condition}, {i.line})")
    elif what == ("try_wait", "parity"):
        barrier, parity = code.address(i.operands[1], 32), code.full(i.operands[2], "u32")
        code.write(i, i.operands[0], f"T.barrier_test({barrier}, {parity}, {condition}, {i.line})", "pred")
    else:
        raise i.refused()


@instruction("fence")
def fence(code, i):
    if i.modifiers[:2] == ("proxy", "async"):
        code.emit(f"T.fence_async({code.condition(i)})")
    elif i.modifiers[0] not in ("mbarrier_init", "acq_rel", "sc"):
        raise i.refused()


@instruction("membar", "setmaxnreg", "griddepcontrol")
def without_effect(code, i):
    """Order of global memory, number of registers, overlap with other launches: one program runs at a time here."""


@instruction("cp")
def cp(code, i):
    if i.modifiers[0] != "async":
        raise i.refused()
    if i.modifiers[1:3] == ("bulk", "tensor"):
        tensor_copy(code, i)
    elif i.modifiers[1] in ("cg", "ca"):
        target, source, size, *given = i.operands
        target, source = code.address(target, 32), code.address(source, 64)
        given = code.full(given[0], "u32") if given else "None"
        code.emit(f"T.copy({target}, {source}, {int(size, 0)}, {given}, {code.condition(i)}, {i.line})")
    else:
        group = "bulk" if i.modifiers[1] == "bulk" else "copy"
        what = i.modifiers[1 + (group == "bulk")]
        if what not in ("commit_group", "wait_group"):
            raise i.refused()
        if what == "commit_group":
            code.emit(f"T.{group}_commit()")
        else:
            reads = f", {'read' in i.modifiers}" if group == "bulk" else ""
            code.emit(f"T.{group}_wait({int(i.operands[0], 0)}{reads})")


def tensor_copy(code, i):
    """TMA, tiled: [shared], [map, {coordinates}], [mbarrier], or [map, {coordinates}], [shared]."""
    stores = i.modifiers[4] == "global"
    if (
        "multicast::cluster" in i.modifiers
        or ("bulk_group" if stores else "mbarrier::complete_tx::bytes") not in i.modifiers
    ):
        raise i.refused()
    there, shared = i.operands if stores else (i.operands[1], i.operands[0])
    tensor, shared = code.full(there[0], "u64"), code.address(shared, 32)
    coordinates = ", ".join(code.full(o, "s32") for o in there[1])
    if stores:
        code.emit(f"T.tensor_store({tensor}, [{coordinates}], {shared}, {code.condition(i)}, {i.line})")
    else:
        barrier = code.address(i.operands[2], 32)
        code.emit(f"T.tensor_load({shared}, {tensor}, [{coordinates}], {barrier}, {code.condition(i)}, {i.line})")
