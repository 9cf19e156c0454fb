"""Any module whose forward torch.fx can trace: conv, BN, (+), ReLU in a row, in whatever way forward calls them."""

from torch import nn

from ..chains import NORMS, Chain, find_chains
from ..guards import bypass_obstacle
from ..program import write_program
from ..registry import is_inlined
from ..swap import Fused
from ..tracing import Trace, Untraceable, sketch, trace
from .base import Family, Fold, Match, Refusal


class FusedForward(Fused):
    """Its forward is generated, see `program`."""


def _knows(kind):
    # torch's own modules are leaves, but for what calls one child after the other
    return kind.forward is nn.Sequential.forward or not kind.__module__.startswith("torch.")


def _find(module):
    inlined = _to_inline(module)
    if inlined is None:
        return []
    try:
        # most modules have nothing: that is seen by a cheap look
        found = find_chains(module, sketch(module, inlined))
        if not found:
            return []
        crossed = _crossed([chain for chain in found if isinstance(chain, Chain)])
        traced = trace(module, crossed)
    except Untraceable as reason:
        return [Refusal(str(reason))]
    return [
        one
        if isinstance(one, Refusal)
        else Match(one.pattern, one.parts, tuple(sorted(crossed)), (traced, one))
        for one in find_chains(module, traced.graph)
    ]  # fmt: skip


def _crossed(chains):
    """Paths of the children whose border a chain of this very forward crosses: only they are inlined.

    A child's forward is then not called, so chains within it, which it would have had fused itself, count as well.
    """
    homes, crossed = {()}, {()}
    while homes:
        scopes = [node.meta["scope"] for chain in chains if chain.home in homes for node in chain.nodes]
        homes = {scope[:depth] for scope in scopes for depth in range(len(scope) + 1)} - crossed
        crossed |= homes
    return frozenset(".".join(path) for path in crossed - {()})


def _folds(module):
    inlined = _to_inline(module)
    if inlined is None:
        return []
    try:
        # any Conv2d takes a norm in, grouped or not
        chains = find_chains(module, trace(module, inlined).graph, lambda conv: bypass_obstacle(conv, nn.Conv2d))
    except Untraceable:
        return []
    return [
        Fold(chain.norm.target, chain.conv.target if chain.post_norm else None)
        for chain in chains
        if isinstance(chain, Chain) and chain.conv is not None
    ]


def _to_inline(module):
    """Paths of the children that may be inlined; None where no norm is within reach, and so no chain."""
    within = dict(_within_reach(module))
    if not any(isinstance(found, NORMS) for found in within.values()):
        return None
    return frozenset(name for name, found in within.items() if is_inlined(found))


def _within_reach(module, prefix=""):
    """(path, module) of the children, and of the children of those that may be inlined."""
    for name, child in module._modules.items():
        if child is not None:
            yield prefix + name, child
            if is_inlined(child):
                yield from _within_reach(child, f"{prefix}{name}.")


def _program(module, matches):
    traced: Trace = matches[0].detail[0]
    return write_program(module, traced, [match.detail[1] for match in matches], frozenset(matches[0].inlined))


FAMILY = Family(knows=_knows, obstacle=lambda kind: "", find=_find, mixin=FusedForward, program=_program, folds=_folds)
