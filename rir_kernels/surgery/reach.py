"""What untraceable code may reach: the objects that it holds, and the names of attributes that it loads."""

import dis
import functools
import gc
import sys
import types
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import nn

_MOST = 10_000  # objects visited per module, so that a dataset that it holds is not searched
_TABLES = ("_modules", "_parameters", "_buffers")
_TRAVERSE = {"modules", "parameters", "buffers", "named_modules", "named_parameters", "named_buffers", "state_dict"}
_TRAVERSE |= {"get_submodule", "get_parameter", "get_buffer"}
_TYPES = {"isinstance", "issubclass", "type", "__class__"}
_LOADS_METHODS = sys.version_info >= (3, 12)  # LOAD_ATTR does, by a flag; earlier LOAD_METHOD
_CHILDREN = {"_modules", "_parameters", "_buffers", "children", "named_children", "__dict__"}


def held_by(module: nn.Module, known: Container[nn.Module]) -> list:
    """Returns modules and tensors within its attributes, other than its children, parameters and buffers."""
    return held_within((value for name, value in module.__dict__.items() if name not in _TABLES), known)


def held_within(objects: Iterable, known: Container[nn.Module]) -> list:
    """Returns modules and tensors that these objects are or refer to, through containers, functions, instances, and
    modules that are not known.
    """
    found, queue, seen = [], list(objects), set[int]()
    while queue and len(seen) < _MOST:
        one = queue.pop()
        # a dead weak proxy raises on any access; code that uses a proxy names what it loads from it
        if type(one) in weakref.ProxyTypes or id(one) in seen:
            continue
        if isinstance(one, type | types.ModuleType | types.CodeType | str | int | float):
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module | torch.Tensor):
            found.append(one)
            if isinstance(one, nn.Module) and one not in known:
                queue.append(one.__dict__)
        elif isinstance(one, types.FunctionType):  # not its globals, which lead everywhere
            queue += [one.__closure__, one.__defaults__, one.__kwdefaults__, one.__dict__]
        elif isinstance(one, weakref.ref):
            queue.append(one())
        else:
            queue += gc.get_referents(one)
    return found


class Load(NamedTuple):
    """A name in code, and the module whose attribute it is; None if it is another object's, a global or a string."""

    name: str
    owner: nn.Module | None
    to_call: bool = False


def name_that_reaches(found: Iterable[Load | None], within, parts: set[nn.Module], names: set[str]) -> str:
    """Returns which of the names found in code may lead to `parts`, or an empty string.

    within: whether another module contains `parts`. names: of the parts and of what they own; they count if the object
    that they are loaded from is unknown. Items count as loaded if a module that has a part as an item is used in any
    way other than a call.
    """
    for load in found:
        if load is None:
            return "has code that cannot be read"
        name, owner = load.name, load.owner
        if owner is None:
            reaches = name in names or name in _TRAVERSE or name in _CHILDREN
        elif name in _CHILDREN:
            reaches = not parts.isdisjoint(owner._modules.values())
        else:
            value = owner._modules.get(name)
            reaches = value in parts or (name in _TRAVERSE and within(owner))
            if value is not None and not load.to_call and hasattr(type(value), "__getitem__"):
                reaches |= not parts.isdisjoint(value._modules.values())
        if reaches:
            return f"names {name!r}"
    return ""


def asks_types(found: Iterable[Load | None]) -> bool:
    """Whether this code may ask for a module's class."""
    return any(load is not None and load.name in _TYPES for load in found)


def loads(code: Callable | type[nn.Module], module: nn.Module) -> Iterator[Load | None]:
    """Yields what a hook or a class's forward, and what they call, load by name; None for code not in Python."""
    known = module  # the first argument
    if isinstance(code, type):
        code = cast(type[nn.Module], code).forward
    while isinstance(code, functools.partial):
        code = code.func
    if isinstance(code, types.MethodType):
        code, known = code.__func__, None
    elif not isinstance(code, types.FunctionType):
        code, known = type(code).__call__, None
    queue: list[tuple[Any, nn.Module | None]] = [(code, known)]
    seen = set()
    while queue:
        function, known = queue.pop()
        if not isinstance(function, types.FunctionType):
            yield None
        elif function not in seen:
            seen.add(function)
            me = function.__code__.co_varnames[:1] if known is not None else ()
            for load in _loads(function.__code__, me, known):
                yield load
                if known is not None and load.owner in (None, module):
                    methods = list(_methods(type(module), load.name))
                    # self finds the first; super() may find any
                    queue += [(f, module) for f in (methods[:1] if load.owner is module else methods)]
                called = function.__globals__.get(load.name)
                queue += [(called, None)] if _is_ours(called) else []


def _loads(code, me, known):
    """Yields attributes and globals that the code loads, and strings that may name some."""
    owner = None
    for instruction in dis.get_instructions(code):
        value = instruction.argval
        if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")):
            last = value[-1] if isinstance(value, tuple) else value
            owner = known if last in me else None
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            to_call = bool((instruction.arg or 0) & 1) if _LOADS_METHODS else instruction.opname == "LOAD_METHOD"
            yield Load(value, owner, to_call)
            owner = owner and owner._modules.get(value)
        elif instruction.opname == "LOAD_GLOBAL":
            yield Load(value, None)
            owner = None
        else:
            if isinstance(value, str) and instruction.opname == "LOAD_CONST":
                yield from (Load(part, None) for part in value.split("."))
            owner = None
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _loads(constant, me, known)


def _methods(kind, name):
    """Returns the functions of this name in a class and its bases outside torch."""
    for base in kind.__mro__:
        found = vars(base).get(name)
        found = getattr(found, "fget", None) or getattr(found, "__func__", None) or found
        if _is_ours(found):
            yield found


def _is_ours(function):
    return isinstance(function, types.FunctionType) and not (function.__module__ or "").startswith("torch.")
