"""Finds what the nodes of a graph read and write, so that operations are reordered only if this has no effect.

Memory is identified by its origin: the node that returned a fresh tensor, the storage of a parameter or buffer, or
forward's arguments, treated as one since they may be views of one tensor. The result of an unknown function or module
counts as a view of all its inputs, and all its inputs as written to.
"""

import functools
import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn.modules import activation, batchnorm, conv, linear, pooling

from ..common.fused_class import class_of
from ..sync_batchnorm import SyncBatchNorm2d
from .bypass import bypass_obstacle
from .folded_norm import FoldedNorm
from .registry import calls_in_turn

_ARGUMENTS = "forward's arguments"
# torch modules whose result is not a view of their input, unless they work in place
_FRESH = {module.__name__ for module in (activation, batchnorm, conv, linear, pooling)}
_FRESH_OPERATORS = {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "matmul", "eq", "ne", "lt", "gt"}
_IN_PLACE_OPERATORS = {"setitem", "delitem"} | {
    name for name in dir(operator) if name[0] == "i" and {name[1:], f"{name[1:]}_"} & set(dir(operator))
}
_HARMLESS = ("builtins", "collections", "math", "_operator")  # their functions write to nothing; `operator`'s: by name


class _Effect(NamedTuple):
    """Effects of a call: whether it writes to its inputs, whether its result may be a view of them, other writes."""

    writes: bool
    views: bool
    tensors: tuple[torch.Tensor, ...]


class Memory:
    """The memory of a graph's nodes. of: for each node of `module`'s forward, all memory its value may be in."""

    def __init__(self, module: nn.Module, nodes: Iterable[fx.Node]):
        self.module = module
        self.effects: dict[fx.Node, _Effect] = {}
        self.of: dict[fx.Node, frozenset] = {}
        for node in nodes:
            if node.op == "call_module":
                self.effects[node] = _of_module(module.get_submodule(str(node.target)))
            self.of[node] = self._result(node)

    def given(self, nodes: Iterable[fx.Node]) -> set:
        """Returns the memory of the values of these nodes."""
        return set().union(*(self.of[node] for node in nodes))

    def written(self, node: fx.Node) -> set:
        """Returns the memory that the node may write to."""
        effect = self.effects.get(node)
        if effect is None:
            return self.given(written_arguments(node))
        return _storages(effect.tensors) | (self.given(node.all_input_nodes) if effect.writes else set())

    def used(self, node: fx.Node) -> set:
        """Returns the memory that the node may read or write."""
        child = self.module.get_submodule(str(node.target)) if node in self.effects else None
        return self.given(node.all_input_nodes) | (set() if child is None else tensors_of(child))

    def _result(self, node):
        if node.op == "placeholder":
            return frozenset([_ARGUMENTS])
        if node.op == "get_attr":
            return frozenset([_storage(operator.attrgetter(node.target)(self.module))])
        effect = self.effects.get(node)
        views = effect.views if effect is not None else node.op == "output" or _views(node)
        return frozenset({node} | (self.given(node.all_input_nodes) if views else set()))


def tensors_of(module: nn.Module) -> set:
    """Returns the memory of the module's parameters and buffers."""
    return _storages(_tensors(module, "_parameters", "_buffers"))


def statistics_of(norm: nn.Module) -> set:
    """Returns the memory of the norm's buffers."""
    return _storages(_tensors(norm, "_buffers"))


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """Returns the arguments that a function or method may write to."""
    if node.op not in ("call_function", "call_method"):
        return []
    if node.op == "call_function" and not (_is_operation(node.target) or _is_harmless(node.target)):
        return node.all_input_nodes
    written = [node.kwargs.get("out")]
    if not _is_operation(node.target) and _writes_first(node):
        written.append(node.args[0] if node.args else node.all_input_nodes)
    if not inspect.isfunction(node.target):  # Python functions may have other argument names
        for overload in _overloads(_operation(node)):
            written += _written_by_schema(overload._schema, node)
    return list(_nodes(written))


def _of_module(module):
    kind = class_of(module)
    if calls_in_turn(kind) and not bypass_obstacle(module, type(module)):
        writes, views, tensors = False, True, ()
        for part in map(_of_module, module._modules.values()):
            writes |= part.writes and views
            views &= part.views
            tensors += part.tensors
        return _Effect(writes, views, tensors)
    if not all(map(_is_known, module.modules())):
        return _Effect(True, True, tuple(_tensors(module, "_parameters", "_buffers")))
    in_place = any(getattr(m, "inplace", False) is not False for m in module.modules())
    fresh = kind.__module__ in _FRESH and kind is not nn.Identity
    return _Effect(in_place, in_place or not fresh, tuple(_tensors(module, "_buffers")))


def _is_known(module):
    kind = class_of(module)
    known = kind.__module__.startswith("torch.nn.modules.") or kind in (FoldedNorm, SyncBatchNorm2d)
    return known and not bypass_obstacle(module, type(module))  # a hook may write to anything


def _tensors(module, *kinds) -> Iterator[torch.Tensor]:
    for m in module.modules():
        for kind in kinds:
            yield from (tensor for tensor in getattr(m, kind).values() if tensor is not None)


def _storages(tensors):
    return {_storage(tensor) for tensor in tensors}


def _storage(value: Any):
    try:
        return "storage", value.untyped_storage()._cdata
    except Exception:  # tensors without a storage: uninitialized, or of a class without one
        return "object", id(value)


def _is_harmless(function):
    """Whether it is torch's or Python's function, whose name and arguments show what it writes to."""
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        return False
    module = getattr(function, "__module__", None)
    if module is None:  # torch.cat and the like
        return getattr(torch, getattr(function, "__name__", ""), None) is function
    return module in _HARMLESS or module == "torch" or module.startswith("torch.")


def _writes_first(node):
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name.startswith("__") or getattr(node.target, "__module__", None) == "_operator":
        return name.strip("_") in _IN_PLACE_OPERATORS
    return name.endswith("_") or _asks_for_in_place(node)


def _asks_for_in_place(node):
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    names = _positional(node.target) if node.op == "call_function" else ()
    return "inplace" in names and node.args[names.index("inplace") :][:1] not in ((), (False,))


@functools.cache
def _positional(function):
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # C functions have no signature, and no argument `inplace`
        return ()


def _written_by_schema(schema, node):
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield node.kwargs.get(argument.name)
            yield node.args[i] if i < len(node.args) and not argument.kwarg_only else None


def _views(node):
    """Whether the result of a function or method may be a view of its inputs."""
    if written_arguments(node):
        return True
    if getattr(node.target, "__module__", None) == "_operator":
        return node.target.__name__ not in _FRESH_OPERATORS
    operation = _operation(node)
    return operation is None or _may_return_views(operation)


def _is_operation(target):
    return isinstance(target, OpOverload | OpOverloadPacket)


def _operation(node):
    """Returns the operation with a schema that the node calls, or None if none has its name."""
    if _is_operation(node.target):
        return node.target
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    named = getattr(torch.ops.aten, name, None)
    return named if _is_operation(named) else None


@functools.cache
def _may_return_views(operation):
    # composite operations may return their input, whatever their schema says: dropout in evaluation
    composed = torch._C.DispatchKey.CompositeImplicitAutograd
    functional = [
        overload
        for overload in _overloads(operation)  # without those for numbers and lists, out= and named dimensions
        if torch._C._dispatch_has_kernel(overload.name())
        and not overload._schema.is_mutable
        and "Dimname" not in str(overload._schema)
    ]
    return not functional or any(
        overload.has_kernel_for_dispatch_key(composed)
        or any(returned.alias_info is not None for returned in overload._schema.returns)
        for overload in functional
    )


def _overloads(operation):
    if operation is None or isinstance(operation, OpOverload):
        return [] if operation is None else [operation]
    return [getattr(operation, name) for name in operation.overloads()]


def _nodes(value) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    yield from found
