"""Any module whose forward torch.fx can trace: conv, BN, (+), ReLU in a row, in whatever way forward calls them."""

from torch import nn

from ..chains import NORMS, Chain, find_chains
from ..guards import bypass_obstacle
from ..program import write_program
from ..registry import is_inlined
from ..swap import Fused
from ..tracing import Trace, Untraceable, options_of, sketch, trace, trace_modes
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
    if "forward" in module.__dict__:
        return [Refusal("its forward was replaced on the instance")]
    try:
        first = trace(module, inlined)
        others = trace_modes(module, inlined, options=True) if options_of(module) else []
    except Untraceable as reason:
        return [Refusal(str(reason))]
    folds = _folds_in(module, first)
    for other in others:
        also = _folds_in(module, other)
        folds = [one if one in also else _with_other_arguments(one) for one in folds]
    traces = (first, *others)
    return [one._replace(traces=traces) if isinstance(one, Fold) else one for one in folds]


def _folds_in(module, traced):
    # any Conv2d takes a norm in, grouped or not
    chains = find_chains(module, traced.graph, lambda conv: bypass_obstacle(conv, nn.Conv2d))
    return [one if isinstance(one, Refusal) else _fold(one) for one in chains]


def _fold(chain):
    if chain.conv is None:
        return Refusal("no convolution in front of the norm", chain.parts)
    if not chain.post_norm:
        return Fold(chain.norm.target)
    scopes = {node.meta["scope"] for node in (chain.conv, chain.norm)}
    inlined = {scope[:depth] for scope in scopes for depth in range(1, len(scope) + 1)}
    return Fold(chain.norm.target, chain.conv.target, tuple(sorted(".".join(path) for path in inlined)))


def _with_other_arguments(one):
    if isinstance(one, Refusal) or one.conv is None:  # an affine map is right wherever the norm is called
        return one
    return Refusal("its forward is another one with other arguments", (one.norm,))


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
