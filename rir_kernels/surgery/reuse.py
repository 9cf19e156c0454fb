"""One trace for many modules: blocks of one class whose forward comes to the same answers have the same graph.

What a forward does follows from its code, from how its module is built, and from what it reads. So a trace serves for
another module of the class that has children of the same classes under the same names, with the same ones shared, and
where all that was read is exactly the same: a 1 is no 1.0, and what is the same object for one has to be for the other.
"""

import functools
import inspect
import types
from collections import OrderedDict

import torch
from torch import nn

from .outside import CONSTANTS
from .reads import Children, Found, Read, child, has

_EXACT = (bool, int, str, type(None), torch.dtype, torch.device)
_CONTAINERS = (list, tuple, torch.Size, dict, OrderedDict)
# what they do is seen by what their code reads, or depends on nothing but the arguments
_KEEP_NOTHING = (
    *CONSTANTS, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.WrapperDescriptorType,
    types.MethodDescriptorType, types.ClassMethodDescriptorType,
)  # fmt: skip


class _Same:
    """Equal where it is of the same object."""

    def __init__(self, one):
        self.one = one

    def __eq__(self, other):
        return type(other) is _Same and self.one is other.one


def likeness(module: nn.Module) -> tuple:
    """How a module is built: the class of all that is within, the names, and what is the same object."""
    numbers, queue, kept = {id(module): 0}, [module], []
    found: list = []
    for one in queue:  # which grows
        found.append(type(one))
        for table in (one._modules, one._parameters, one._buffers):
            found.append(len(table))
            for name, value in table.items():
                if id(value) not in numbers and isinstance(value, nn.Module):
                    queue.append(value)
                kept.append(value)  # an id is of one object only as long as it is there
                found += (name, type(value), numbers.setdefault(id(value), len(numbers)))
    return tuple(found)


def answers(module: nn.Module, reads: tuple[Read, ...]) -> list:
    """What each read finds in the module, to be compared with what it finds in another one."""
    return [_answer(child(module, read.path), read) for read in reads]


def serves_others(trace, module: nn.Module) -> bool:
    """Whether nothing that decided the graph may know which module it is: a cache, or a table of modules."""
    outside = all(map(_keeps_nothing, (part for one in trace.outside for part in one.parts)))
    return outside and all(_is_plain(child(module, read.path), read) for read in trace.reads)


def _answer(owner, read):
    name = read.name
    if read.found is Found.ABSENT:
        return has(owner, name)
    if isinstance(read.found, Children | Found):
        return name in owner.__dict__  # the rest is how it is built
    try:
        return _exactly(getattr(owner, name))
    except Exception as error:
        return _Same(error)


def _exactly(value):
    if type(value) in _CONTAINERS:
        return type(value), *map(_exactly, value.items() if isinstance(value, dict) else value)
    if type(value) in _EXACT:
        return type(value), value
    if type(value) is float:
        return float, repr(value)  # of 0.0 and -0.0, and of nan
    if isinstance(value, types.MethodType):
        return _Same(value.__self__), _Same(value.__func__)
    return _Same(value)


def _is_plain(owner, read):
    if read.found is Found.OF_THE_CLASS:
        return _is_a_function(inspect.getattr_static(type(owner), read.name, None))
    value = read.found
    return type(value) is types.MethodType or not callable(value) or _keeps_nothing(value)


def _is_a_function(value):
    part = {property: "fget", classmethod: "__func__", staticmethod: "__func__"}.get(type(value))
    return isinstance(value if part is None else getattr(value, part), types.FunctionType)


def _keeps_nothing(value):
    if isinstance(value, nn.Module | functools.partial):
        return False
    return isinstance(value, _KEEP_NOTHING) or type(value).__module__.partition(".")[0] in ("torch", "typing")
