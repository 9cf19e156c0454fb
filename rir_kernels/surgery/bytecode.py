"""Reads from a function's bytecode, before it runs, what the function reads and asks."""

import dis
import functools

_READS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "STORE_GLOBAL", "DELETE_GLOBAL"}
_STORES = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR"}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR"}
_BETWEEN = {"EXTENDED_ARG", "CACHE", "COPY", "DUP_TOP", "PUSH_NULL"}
_CALLS = {"CALL", "PRECALL", "CALL_FUNCTION", "CALL_METHOD"}


@functools.lru_cache(maxsize=4096)
def reads(code):
    """Returns (where, names) of what the code reads: a name, and the attributes taken from it."""
    found: list[tuple[str, tuple]] = []
    names: tuple = ()
    where = ""
    for instruction in dis.get_instructions(code):
        if names and instruction.opname in _BETWEEN:
            continue
        if names and instruction.opname in _ATTRIBUTES:
            names = (*names, instruction.argval)
            where = "stored" if where == "global" and instruction.opname in _STORES else where
            continue
        if names:
            found.append((where, names))
            names = ()
        if instruction.opname in _READS:
            names = (instruction.argval,)
            where = "stored" if instruction.opname in _STORES else "free" if "DEREF" in instruction.opname else "global"
    return tuple(dict.fromkeys(found))


def takes_nothing(frame):
    """Whether the frame's current call has no arguments."""
    code = frame.f_code.co_code
    return dis.opname[code[frame.f_lasti]] in _CALLS and code[frame.f_lasti + 1] == 0
