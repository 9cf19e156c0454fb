"""Reuses one trace for many modules: blocks of one class whose forward reads the same values have the same graph.

What a forward does depends on its code, its module's structure, and what it reads. So a trace also serves another
module of the class that has children of the same classes under the same names, with the same sharing, and exactly the
same values read: 1 differs from 1.0, and what is one object in the first module must be one in the other.
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
# their behavior shows in what their code reads, or depends only on the arguments
_KEEP_NOTHING = (
    *CONSTANTS, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.WrapperDescriptorType,
    types.MethodDescriptorType, types.ClassMethodDescriptorType,
)  # fmt: skip


class _Same:
    """Wraps an object; equal only to a wrapper of the same object."""

    def __init__(self, one):
        self.one = one

    def __eq__(self, other):
        return type(other) is _Same and self.one is other.one


def likeness(module: nn.Module) -> tuple:
    """Returns a module's structure: the classes of everything within, the names, and which objects are shared."""
    numbers, queue, kept = {id(module): 0}, [module], []
    found: list = []
    for one in queue:  # the loop extends it
        found.append(type(one))
        for table in (one._modules, one._parameters, one._buffers):
            found.append(len(table))
            for name, value in table.items():
                if id(value) not in numbers and isinstance(value, nn.Module):
                    queue.append(value)
                kept.append(value)  # ids are unique only while the objects are alive
                found += (name, type(value), numbers.setdefault(id(value), len(numbers)))
    return tuple(found)


def answers(module: nn.Module, reads: tuple[Read, ...]) -> list:
    """Returns what each read finds in the module, for comparison with another module."""
    return [_answer(child(module, read.path), read) for read in reads]


def serves_others(trace, module: nn.Module) -> bool:
    """Whether the graph depends on nothing that may identify the module, such as a cache or a table of modules."""
    outside = all(map(_keeps_nothing, (part for one in trace.outside for part in one.parts)))
    return outside and all(_is_plain(child(module, read.path), read) for read in trace.reads)


def _answer(owner, read):
    name = read.name
    if read.found is Found.ABSENT:
        return has(owner, name)
    if isinstance(read.found, Children | Found):
        return name in owner.__dict__  # the rest is part of the structure
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
        return float, repr(value)  # distinguishes 0.0 from -0.0, and equates nan
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
