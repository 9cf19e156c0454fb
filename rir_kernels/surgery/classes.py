"""Snapshots of torch's and users' classes and methods when they are fused, and whether a class can be subclassed.

Libraries patch methods on classes (adapters, seamless tiling) and rebind torch's names to their own subclasses
(quantization). So torch's classes are taken once, at import, and methods are compared by identity at every call.
"""

import abc
import dis
import functools
import types
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..common.tracing import not_traced

Kind = TypeVar("Kind", bound=nn.Module)

# owner, name, the method, and its code, which a tool that reloads sources replaces
Method = tuple[type | types.ModuleType, str, object, types.CodeType | None]


def of_torch(kind: type[Kind]) -> type[Kind]:
    """Returns the class that torch defined, even if its name has been rebound to a subclass."""
    return cast(type[Kind], next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules.")))


Conv2d, BatchNorm2d = of_torch(nn.Conv2d), of_torch(nn.BatchNorm2d)
ReLU, Identity = of_torch(nn.ReLU), of_torch(nn.Identity)
_BYPASSED = ("forward", "_conv_forward", "_check_input_dim")  # the methods that torch's modules run, if they have them


def methods_of(kind: type, *names: str) -> tuple[Method, ...]:
    """Returns these methods as `kind` has them now, and those of its bases, which its methods may call."""
    bases = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    return tuple(_method(base, name) for name in names for base in bases if base is kind or name in vars(base))


def _method(owner, name) -> Method:
    method = getattr(owner, name)
    return owner, name, method, getattr(method, "__code__", None)


def replaced(methods: tuple[Method, ...]) -> str:
    """Returns why code that replaces these methods may not run: one of them has changed; else an empty string."""
    compiling = torch.compiler.is_compiling()
    for kind, name, method, code in methods:
        now = getattr(kind, name, None)
        # a class method is bound anew at each look-up
        if now != method or (not compiling and getattr(now, "__code__", None) is not code):
            where = "" if isinstance(kind, types.ModuleType) else " on the class"
            return f"{kind.__name__}.{name} has been replaced{where}"
    return ""


@not_traced
def know(kind: type, function: str | None = None) -> None:
    """Allows instances of `kind` to be bypassed, as long as the class is as its library defined it.

    function: the name in torch.nn.functional of what its forward calls, and tools that count operations replace.
    """
    if kind in _known:
        return
    methods = methods_of(kind, *(name for name in _BYPASSED if hasattr(kind, name)))
    if kind.__module__.startswith("torch."):  # torch's methods call none of these of their bases
        methods = tuple(method for method in methods if method[0] is kind)
    # if it was already patched, store an object that equals nothing
    _known[kind] = tuple((base, name, m if _is_from(base, m) else object(), code) for base, name, m, code in methods)
    if function is not None:
        _known[kind] += (_method(F, function),)


def patched(kind: type) -> str:
    """Returns why a class that we `know` is not as its library defined it; an empty string for other classes."""
    methods = _known.get(kind)
    if methods is None:
        return ""
    if kind.__call__ is not nn.Module.__call__:
        return f"{kind.__name__}.__call__ has been replaced on the class"
    return replaced(methods)


def _is_from(base, method):
    home = getattr(method, "__globals__", {}).get("__name__")
    return home in [ancestor.__module__ for ancestor in base.__mro__]


_known: dict[type, tuple[Method, ...]] = {}
know(Conv2d, "conv2d")
know(BatchNorm2d, "batch_norm")
know(Identity)


def subclass_of(kind: type, mixin: type, namespace: dict) -> type:
    """Creates class Fused<Kind>(mixin, kind) without running code of `kind`, so registries of subclasses miss it.

    mixin: overrides __init_subclass__. The metaclass is kept, but neither its __new__ nor its __init__ runs.
    """
    # abc keeps data per class, which a class not created by ABCMeta would share with its base
    make = abc.ABCMeta if isinstance(kind, abc.ABCMeta) else type
    return make.__new__(type(kind), f"Fused{kind.__name__}", (mixin, kind), namespace)


@functools.cache
def subclass_obstacle(kind: type) -> str:
    """Returns why an instance of `kind` would behave differently in a subclass that changes nothing."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, value in vars(base).items():
            if name != "__init__" and any(_calls_super_of_own_class(code) for code in _codes(value)):
                return f"{base.__name__}.{name} calls super() of the instance's own class: in a subclass, without end"
    return ""


def _codes(attribute):
    """Yields the code objects of a method or property, including wrapped ones."""
    parts = ("fget", "fset", "fdel") if isinstance(attribute, property) else ("__func__", "__wrapped__")
    for function in (attribute, *(getattr(attribute, part, None) for part in parts)):
        if isinstance(function, types.FunctionType):
            yield function.__code__


def _calls_super_of_own_class(code):
    """Whether the code contains super(self.__class__, ...) or super(type(self), ...)."""
    if "super" in code.co_names and ("__class__" in code.co_names or "type" in code.co_names):
        loaded = [i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD_")]
        for first, second, third in zip(loaded, loaded[1:], loaded[2:], strict=False):
            if first == "super" and (second == "type" or third == "__class__"):
                return True
    return any(_calls_super_of_own_class(const) for const in code.co_consts if isinstance(const, types.CodeType))
