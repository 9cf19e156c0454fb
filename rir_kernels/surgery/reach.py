"""What code that cannot be traced may come to: the objects that it holds, and the names of attributes that it loads."""

import dis
import functools
import gc
import types
import weakref
from collections.abc import Callable, Container, Iterable

import torch
from torch import nn

_MOST = 10_000  # objects looked at for one module: a dataset that it holds is not searched
_TABLES = ("_modules", "_parameters", "_buffers")
_TRAVERSE = {"modules", "parameters", "buffers", "named_modules", "named_parameters", "named_buffers", "state_dict"}
_TRAVERSE |= {"get_submodule", "get_parameter", "get_buffer"}
_CHILDREN = {"_modules", "_parameters", "_buffers", "children", "named_children", "__dict__"}


def held_by(module: nn.Module, known: Container[nn.Module]) -> list:
    """Modules and tensors within its attributes, other than its children, parameters and buffers."""
    return held_within((value for name, value in module.__dict__.items() if name not in _TABLES), known)


def held_within(objects: Iterable, known: Container[nn.Module]) -> list:
    """Modules and tensors that these objects are or refer to: through containers, functions, instances, and modules
    that are not known.
    """
    found, queue, seen = [], list(objects), set()
    while queue and len(seen) < _MOST:
        one = queue.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.CodeType | str | int | float):
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


def code_may_reach(code: Callable | type, module: nn.Module, within, parts: set[nn.Module], names: set[str]) -> str:
    """Which attribute in the code of a hook, or in the forward of a class, may lead to `parts`, or an empty string.

    module: what the code calls self. within: whether another module has `parts` within. names: of the parts, and of
    what they own: they count where nothing is known of the object that they are loaded from.
    """
    known = module  # by the first argument
    if isinstance(code, type):
        code = code.forward
    while isinstance(code, functools.partial):
        code = code.func
    if isinstance(code, types.MethodType):
        code, known = code.__func__, None
    elif not isinstance(code, types.FunctionType):
        code, known = type(code).__call__, None
    queue, seen = [(code, known)], set()
    while queue:
        function, known = queue.pop()
        if not isinstance(function, types.FunctionType):
            return "has code that cannot be read"
        if function in seen:
            continue
        seen.add(function)
        me = function.__code__.co_varnames[:1] if known is not None else ()
        for loaded, owner in _loads(function.__code__, me, known):
            if owner is None:
                reaches = loaded in names or loaded in _TRAVERSE or loaded in _CHILDREN
            elif loaded in _CHILDREN:
                reaches = not parts.isdisjoint(owner._modules.values())
            else:
                reaches = owner._modules.get(loaded) in parts or (loaded in _TRAVERSE and within(owner))
            if reaches:
                return f"names {loaded!r}"
            if owner is None or owner is module:
                queue += [(f, module) for f in _methods(type(module), loaded) if known is not None]
            queue += [(f, None) for f in [function.__globals__.get(loaded)] if _is_ours(f)]
    return ""


def _loads(code, me, known):
    """(name, the module it is loaded from or None) of attributes and globals, and of strings that may name some."""
    owner = None
    for instruction in dis.get_instructions(code):
        value = instruction.argval
        if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")):
            last = value[-1] if isinstance(value, tuple) else value
            owner = known if last in me else None
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            yield value, owner
            owner = owner and owner._modules.get(value)
        elif instruction.opname == "LOAD_GLOBAL":
            yield value, None
            owner = None
        else:
            if isinstance(value, str) and instruction.opname == "LOAD_CONST":
                yield from ((part, None) for part in value.split("."))
            owner = None
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _loads(constant, me, known)


def _methods(kind, name):
    """The functions that a class and its bases outside torch have by this name."""
    for base in kind.__mro__:
        found = vars(base).get(name)
        found = getattr(found, "fget", None) or getattr(found, "__func__", None) or found
        if _is_ours(found):
            yield found


def _is_ours(function):
    return isinstance(function, types.FunctionType) and not (function.__module__ or "").startswith("torch.")
