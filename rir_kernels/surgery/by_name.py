"""What a function may read other than globals and the module's own attributes.

These are a class's attributes through super(), type(self) or self.__class__, attributes of what it imports, and names
given to hasattr or getattr. This does not track which name is read from which object: any name in the code counts for
each.
"""

import dis
import functools
import importlib.util
import inspect
import itertools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

_ASK_CLASSES = {"super", "type", "__class__"}
_ASK_WHICH = {"isinstance", "issubclass", "type", "__class__"}
_COMPARE = {"IS_OP", "COMPARE_OP", "CONTAINS_OP"}
_ASK_NAMES = {"hasattr", "getattr"}
_ANY_NAME = {"globals", "vars", "eval", "exec"}  # builtins
_METHODS = (types.FunctionType, classmethod, staticmethod, property, functools.cached_property)


@functools.lru_cache(maxsize=4096)
def asks_which(code: types.CodeType) -> bool:
    """Whether the code may ask for an object's class, or compares two things, neither of them a constant."""
    if not _ASK_WHICH.isdisjoint(code.co_names):
        return True
    steps = [instruction.opname for instruction in dis.get_instructions(code)]
    return "MATCH_CLASS" in steps or any(
        step in _COMPARE and before != "LOAD_CONST" for before, step in itertools.pairwise(steps)
    )


def any_name(code: types.CodeType, names: dict) -> str:
    """Returns the name of a function in the code that may read anything; an empty string if there is none."""
    if _ANY_NAME.isdisjoint(code.co_names):  # co_names has attributes too
        return ""
    loaded = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    return next((name for name in loaded if name in _ANY_NAME and name not in names), "")


def read_by_name(code: types.CodeType, names: dict, classes: Iterable[type]) -> Iterator[tuple[Any, str]]:
    """Yields (owner, attribute), including absent attributes. names: the globals; classes: of the module.

    Omits methods and properties, which are checked elsewhere.
    """
    used = set(code.co_names)
    asked = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()} if used & _ASK_NAMES else set()
    owners = list(_imported(code, names))
    if used & _ASK_CLASSES:
        owners += classes
    for owner in owners:
        for name in sorted(used | asked):
            there = inspect.getattr_static(owner, name, None)
            if (there is not None or name in asked) and not isinstance(there, _METHODS):
                yield owner, name
    for owner in (names[name] for name in code.co_names if name in names) if asked else ():
        if isinstance(owner, type | types.ModuleType):
            yield from ((owner, name) for name in sorted(asked))


def _imported(code, names):
    """Yields the modules that the code imports and that are already loaded."""
    constants = []
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_CONST":
            constants.append(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            name, (level, listed) = instruction.argval, constants[-2:]
            if level:
                name = importlib.util.resolve_name("." * level + name, names.get("__package__") or names["__name__"])
            for full in (name, *(f"{name}.{part}" for part in listed or ())):
                if full in sys.modules:
                    yield sys.modules[full]
