"""Attributes that a forward reads from its modules: recorded during the trace, and checked again at every call."""

import enum
import inspect
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import nn

from .outside import is_fixed
from .recording import refuse

Path = tuple[str, ...]  # names of nested children; () is the module itself
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, enum.Enum)


def path_of(name: str) -> Path:
    """Converts a child's dotted name to a Path."""
    return tuple(name.split("."))


class Read(NamedTuple):
    """Attribute `name` of the module at `path`, as forward found it: see `holds`."""

    path: Path
    name: str
    found: Any


class Found(enum.Enum):
    NONE = "a child, parameter or buffer that is None"
    PRESENT = "a child, parameter or buffer that is not"
    OF_THE_CLASS = "a method or property that the instance does not override"
    ABSENT = "nothing: hasattr was False, or getattr returned its default"


class Children(NamedTuple):
    names: tuple[str, ...]


class _Items(NamedTuple):
    of_dict: tuple[tuple, ...]


def holds(module: nn.Module, read: Read) -> bool:
    """Whether the attribute is still what the trace found. Cheap, as every call asks it."""
    found, name = read.found, read.name
    if found is Found.OF_THE_CLASS:
        return name not in module.__dict__
    if found is Found.ABSENT:
        return not has(module, name)
    if found is Found.PRESENT or found is Found.NONE:
        # nn.Module's look-up is in Python, and slow
        value = module._modules.get(name)
        value = getattr(module, name, None) if value is None else value
        return (value is None) == (found is Found.NONE)
    kind = type(found)
    if kind is Children:
        return tuple(module._modules) == found.names
    value = getattr(module, name, Found.PRESENT)  # the default equals no constant
    if kind is _Items:
        return isinstance(value, dict) and tuple(value.items()) == found.of_dict
    return (tuple(value) if type(value) is list else value) == found


def is_of_the_class(read: Read) -> bool:
    """Whether it is a method or property that the instance does not override."""
    return read.found is Found.OF_THE_CLASS


def has(module: nn.Module, name: str) -> bool:
    """Does what hasattr does, without the exception that nn.Module raises for an unknown name."""
    kept = (module.__dict__, module._modules, module._parameters, module._buffers)
    return any(name in names for names in kept) or hasattr(type(module), name)


def child(module: nn.Module, path: Path) -> nn.Module | None:
    """Returns the module at `path`, or None if there is none any more."""
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def found_in_dicts(module: nn.Module, name: str) -> tuple[Found, Any]:
    """Returns what nn.Module.__getattr__ finds, and whether it exists; Untraceable if a class overrides __getattr__."""
    attributes = object.__getattribute__(module, "__dict__")
    own = next(kind for kind in type(module).__mro__ if "__getattr__" in vars(kind))
    for table in ("_parameters", "_buffers", "_modules"):
        if name in attributes.get(table, ()):
            value = attributes[table][name]
            if own is not nn.Module and isinstance(value, torch.Tensor):
                break
            return (Found.NONE if value is None else Found.PRESENT), value
    if own is not nn.Module:
        refuse(f"its forward reads {name!r}, for which {own.__name__} has a __getattr__")
    return Found.ABSENT, None


def found(module: nn.Module, name: str, value) -> Any:
    """Returns what to record of an attribute's value. Raises Untraceable if it may differ at the next call."""
    if name == "_modules":
        return Children(tuple(value))
    own = object.__getattribute__(module, "__dict__")
    if name not in own and (inspect.ismethod(value) or isinstance(getattr(type(module), name, None), property)):
        return Found.OF_THE_CLASS
    if type(value) in (list, tuple, torch.Size) and all(isinstance(item, _CONSTANTS) for item in value):
        return tuple(value)
    if type(value) in (dict, OrderedDict) and all(isinstance(x, _CONSTANTS) for item in value.items() for x in item):
        return _Items(tuple(value.items()))
    if isinstance(value, _CONSTANTS):
        return value
    named = "<" not in getattr(value, "__qualname__", "<")  # can be found again by name
    if callable(value) and named and (is_fixed(value) or isinstance(value.__self__, nn.Module)):
        return value
    return refuse(f"its forward reads the attribute {name!r}, a {type(value).__name__}")
