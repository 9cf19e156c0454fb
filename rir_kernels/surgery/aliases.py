"""Children, parameters and buffers that have several names: a graph uses one of them, whichever forward went by."""

import itertools
from collections.abc import Iterator

from torch import fx, nn

from .registry import is_never_called
from .tracing import Path, child

Alias = tuple[Path, Path]  # the name in the graph, and another


def aliases(module: nn.Module, graph: fx.Graph, inlined: frozenset[str]) -> tuple[Alias, ...]:
    """The names that must go on leading to the same, wherever the graph stands for forward.

    inlined: the children whose forward is a part of the graph. The names within others are for those to use.
    """
    known = {found: name for name, found in module.named_modules()}  # as torch.fx names them
    pairs = [(known[found], name) for name, found in _named(module, known, {"", *inlined})]
    read = {id(_at(module, _path(node.target))): node.target for node in graph.nodes if node.op == "get_attr"}
    tensors = itertools.chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    )
    pairs += [(read[id(tensor)], name) for name, tensor in tensors if id(tensor) in read]
    return tuple((_path(one), _path(other)) for one, other in pairs if one != other)


def parted(module: nn.Module, pairs: tuple[Alias, ...]) -> str:
    """Why the graph does not stand for forward any more: one of the names has been given to something else."""
    for one, other in pairs:
        if _at(module, one) is not _at(module, other):
            return f"{'.'.join(one)} and {'.'.join(other)} are no longer the same"
    return ""


def _named(module, known, looked_into, prefix="") -> Iterator[tuple[str, nn.Module]]:
    """The children by all names that a forward which is looked into may use."""
    for name, found in module._modules.items():
        if found is not None:
            yield prefix + name, found
            if known[found] in looked_into or is_never_called(type(found)):
                yield from _named(found, known, looked_into, f"{prefix}{name}.")


def _path(name):
    return tuple(name.split("."))


def _at(module, path):
    owner = child(module, path[:-1])
    return None if owner is None else getattr(owner, path[-1], None)
