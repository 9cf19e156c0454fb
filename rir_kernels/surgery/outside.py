"""What a forward reads outside its module, and what must still hold at every call.

These are globals and their attributes (`config.SWITCH`, `Net.count`), closure variables, default arguments, and torch's
answers (is_tracing, is_grad_enabled). `watch` finds them in the bytecode of the functions that ran; this module keeps a
record of each (`Outside`), which is copied and pickled with a fused module.
"""

import enum
import functools
import pkgutil
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, enum.Enum)
CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_BY_CONTENT = (*CONTAINERS, functools.partial)  # a partial's keywords may change
_MOST = 64  # items of a container that are compared at every call
_CALLABLES = (
    type, types.ModuleType, types.FunctionType, types.WrapperDescriptorType, types.MethodDescriptorType,
    types.ClassMethodDescriptorType, types.MethodWrapperType, types.GenericAlias, np.ufunc,
)  # fmt: skip
_DRAW: tuple[Any, ...] = (random.random, np.random.rand)  # methods, though the stubs declare functions
_WATCHED = tuple(draw.__self__ for draw in _DRAW)  # the generators behind the functions of these modules


class _Missing(enum.Enum):
    NOTHING = "there is nothing of this name"
    CHANGED = "what was found is no more: nothing is the same"


MISSING = _Missing.NOTHING


class Unknown(Exception):
    """Raised for a value that cannot be compared at the next call."""


class Outside:
    """A record that `steps` from `start` led to `found`, or to a function that returned it for `arguments`.

    base, prefix: how to find `start` in another process, from a module, a class or a function.
    name: its name in the source.
    """

    __slots__ = ("arguments", "base", "code", "content", "found", "name", "prefix", "start", "steps")

    def __init__(self, base, prefix: tuple, steps: tuple, arguments: tuple | None = None, found: Any = MISSING):
        self.base, self.prefix, self.steps, self.arguments = base, prefix, steps, arguments
        self.start = walk(base, prefix)
        value = walk(self.start, steps) if arguments is None else walk(self.start, steps)(*arguments)
        self.content = isinstance(value, _BY_CONTENT)
        self.found = found if found is not MISSING else told(value)
        # a tool that reloads sources replaces __code__
        self.code = None if self.content else getattr(self.found, "__code__", None)
        names = steps
        if steps[0] == "cell_contents":  # a variable of a closure
            *function, _, index = prefix
            names = (walk(base, function).__code__.co_freevars[index], *steps[1:])
        self.name = ".".join(map(str, names))

    @property
    def question(self) -> tuple:
        """Returns what was asked, independent of the answer."""
        return id(self.start), self.steps, self.arguments

    @property
    def parts(self) -> list:
        """Returns what was found; for a container its items and their types."""
        return _flat(self.found) if self.content else [self.found]

    def holds(self) -> bool:
        """Whether it is still what forward found. Cheap, as every call asks it."""
        value = self.start
        for step in self.steps:
            value = _step(value, step)
        if self.arguments is not None:
            value = value(*self.arguments)
        found = self.found
        if self.content:
            return isinstance(value, _BY_CONTENT) and _content(value) == found
        if (
            self.code is not None
            and not torch.compiler.is_compiling()
            and getattr(value, "__code__", None) is not self.code
        ):
            return False
        return value is found or (type(value) is type(found) and value == found)

    def _key(self):
        found = self.found if self.content or isinstance(self.found, CONSTANTS) else id(self.found)
        return id(self.base), self.prefix, self.steps, self.arguments, found

    def __eq__(self, other):
        return type(other) is Outside and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def __deepcopy__(self, memo):
        return self  # what it refers to exists only once

    def __reduce__(self):
        # unpickling looks the objects up again, as they need not have a name
        found = MISSING if self.holds() else _Missing.CHANGED
        if isinstance(self.found, CONSTANTS) or (
            self.content and all(isinstance(item, CONSTANTS) for item in _flat(self.found))
        ):
            found = self.found
        base = self.base.__name__ if isinstance(self.base, types.ModuleType) else self.base
        base = base["__name__"] if isinstance(base, dict) else base
        return _again, (base, self.prefix, self.steps, self.arguments, found)


def _again(base, *rest):
    if isinstance(base, str):
        base = sys.modules.get(base) or pkgutil.resolve_name(base)
    return Outside(base, *rest)


def namespace(names: dict) -> types.ModuleType | dict:
    """Returns a function's globals as a base: their module, if it is imported."""
    module = sys.modules.get(names.get("__name__", ""))
    return module if module is not None and getattr(module, "__dict__", None) is names else names


def walk(value, steps: Iterable):
    """Follows the steps from the value; returns MISSING if there is nothing."""
    for step in steps:
        value = _step(value, step)
    return value


def _step(value, step):
    if type(step) is int:
        return value[step]
    if type(value) is dict:
        return value.get(step, MISSING)
    return getattr(value, step, MISSING)


def told(value):
    """Returns what the next call compares with. Raises Unknown if it may have changed by then, or draws numbers."""
    if isinstance(value, _BY_CONTENT):
        content = _content(value)
        if len(_flat(content)) > _MOST:
            raise Unknown(f"a {type(value).__name__} of more than {_MOST} items")
        for item in _flat(content):
            told(item)
        return content
    if value is MISSING or isinstance(value, CONSTANTS) or is_fixed(value):
        return value
    raise Unknown(f"a {type(value).__name__}")


def is_fixed(value) -> bool:
    """Whether it is a module, a class or a stateless callable: the same object then does the same."""
    if isinstance(value, types.BuiltinFunctionType | types.MethodType):
        owner = value.__self__
        return owner is None or isinstance(owner, types.ModuleType | type) or any(owner is one for one in _WATCHED)
    if isinstance(value, _CALLABLES):
        return True
    home = type(value).__module__.partition(".")[0]
    return home == "typing" or (callable(value) and home in ("torch", "functools", "builtins", "numpy"))


def _content(value):
    """Converts a container to nested tuples that can be compared and hashed; returns anything else unchanged."""
    if isinstance(value, dict):
        return (dict, *((_content(key), _content(item)) for key, item in value.items()))
    if isinstance(value, list | tuple | deque):
        return (type(value), *(_content(item) for item in value))
    if isinstance(value, functools.partial):
        return (functools.partial, _content(value.func), _content(value.args), _content(value.keywords))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(value)
    return value


def _flat(content):
    if not isinstance(content, tuple | frozenset):
        return [content]
    return [one for item in content for one in _flat(item)]


class Kept:
    """Saves the contents of containers, and restores them."""

    def __init__(self):
        self.copies = {}  # by id: the container and a copy of its contents

    def keep(self, value) -> None:
        """Saves this container and those within."""
        if not isinstance(value, CONTAINERS) or id(value) in self.copies:
            return
        items = list(value.items() if isinstance(value, dict) else value)
        self.copies[id(value)] = value, items
        for item in items:
            for one in item if isinstance(value, dict) else (item,):
                self.keep(one)

    def restore(self) -> bool:
        """Restores all containers; returns whether any had changed."""
        changed = False
        for value, before in self.copies.values():
            now = list(value.items() if isinstance(value, dict) else value)
            if len(now) == len(before) and all(map(_same, now, before)):
                continue
            changed = True
            if isinstance(value, list | deque):
                value.clear()
                value.extend(before)
            else:
                value.clear()
                value.update(OrderedDict(before) if isinstance(value, dict) else before)
        return changed


def _same(a, b):
    # a dict's items() makes new pairs each time
    return a is b or (type(a) is tuple and type(b) is tuple and len(a) == len(b) == 2 and a[0] is b[0] and a[1] is b[1])
