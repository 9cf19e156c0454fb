"""What a graph takes for granted: which children, parameters and buffers are shared, and the children's classes.

A graph has one name for an object that has several. And forward may have compared objects by identity, or asked for a
child's class, in a way that shows only in its code.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..common.fused_class import class_of
from .reads import Path, child, path_of
from .registry import is_never_called
from .tracing import Trace


@dataclass(frozen=True)
class Granted:
    """names: of objects, each with the first name of the same object. kinds: the children's classes."""

    names: tuple[tuple[Path, int], ...]
    kinds: tuple[tuple[Path, type], ...]

    def obstacle(self, module: nn.Module) -> str:
        """Returns why the graph no longer represents forward, or an empty string."""
        found: dict[int, int] = {}
        for i, (name, first) in enumerate(self.names):
            if found.setdefault(id(_at(module, name)), i) != first:
                return f"{'.'.join(name)} is another one"
        for name, kind in self.kinds:
            if class_of(_at(module, name)) is not kind:
                return f"{'.'.join(name)} is no {kind.__name__} any more"
        return ""


def granted(module: nn.Module, trace: Trace, inlined: frozenset[str]) -> Granted:
    """Collects what the graph takes for granted. inlined: the children whose forward is part of the graph.

    Names within other children don't count.
    """
    aliases = _aliases(module, trace.graph, {"", *inlined})
    names = [path_of(name) for one, other in aliases if one != other for name in (one, other)]
    kinds = {}
    if trace.asks_which:
        asked = dict.fromkeys(_asked(module, trace.reads))
        names += asked
        kinds = {name: class_of(found) for name in asked if isinstance(found := _at(module, name), nn.Module)}
    first: dict[int, int] = {}
    names = [(name, first.setdefault(id(_at(module, name)), i)) for i, name in enumerate(dict.fromkeys(names))]
    return Granted(tuple(names), tuple(kinds.items()))


def _aliases(module, graph, looked_into) -> Iterator[tuple[str, str]]:
    """Yields (the name in the graph, a name that forward may use)."""
    known = {found: name for name, found in module.named_modules()}  # as torch.fx names them
    yield from ((known[found], name) for name, found in _named(module, known, looked_into))
    read = {id(_at(module, path_of(node.target))): node.target for node in graph.nodes if node.op == "get_attr"}
    tensors = itertools.chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    )
    yield from ((read[id(tensor)], name) for name, tensor in tensors if id(tensor) in read)


def _named(module, known, looked_into, prefix="") -> Iterator[tuple[str, nn.Module]]:
    """Yields the children by all names that an inlined forward may use."""
    for name, found in module._modules.items():
        if found is not None:
            yield prefix + name, found
            if known[found] in looked_into or is_never_called(type(found)):
                yield from _named(found, known, looked_into, f"{prefix}{name}.")


def _asked(module, reads) -> Iterator[Path]:
    """Yields what forward has read: children, parameters and buffers."""
    for path, name, _ in reads:
        owner = child(module, path)
        if owner is None:
            continue
        if name == "_modules":
            yield from ((*path, key) for key, value in owner._modules.items() if value is not None)
        elif any(table.get(name) is not None for table in (owner._modules, owner._parameters, owner._buffers)):
            yield *path, name


def _at(module, path):
    owner = child(module, path[:-1])
    return None if owner is None else getattr(owner, path[-1], None)
