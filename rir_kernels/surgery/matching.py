"""Finds chains of conv, BN, (+), activation in a forward's graph: the nodes that make up one fused operation.

A chain is matched outwards from its norm, back to the convolution and on to the activation. Nothing else uses its inner
nodes, so they can be removed; the fused operation replaces the last node.
"""

import functools
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .activations import KINDS, activation_of_call
from .bypass import act_of_norm, activation_obstacle, conv_obstacle, norm_obstacle
from .classes import Identity
from .effects import Memory, statistics_of, tensors_of, written_arguments
from .folded_norm import FoldedNorm
from .patterns.base import Refusal
from .reads import Path

NORMS = (_NormBase, FoldedNorm)  # what looks like a norm
_ADD = {operator.add, operator.iadd, torch.add}
_MULTIPLY = {operator.mul, operator.imul, torch.mul, torch.multiply}


@dataclass
class Chain:
    """y = act(norm(scale * conv(x) + residuals)) or, post_norm, act(scale * norm(conv(x)) + residuals)."""

    norm: fx.Node
    conv: fx.Node | None = None
    scale: float = 1.0
    residuals: list[fx.Node] = field(default_factory=list)
    post_norm: bool = True
    activation: fx.Node | None = None
    norm_acts: bool = False  # its forward ends with the activation
    nodes: list[fx.Node] = field(default_factory=list)  # all nodes that it replaces, in graph order

    @property
    def pattern(self) -> str:
        if self.conv is None:
            return "bn_act"
        if self.residuals:
            if not self.post_norm:
                return "conv_add_bn_act"
            return "conv_bn_add_act" if self.scale == 1 else "conv_bn_scaled_add_act"
        return "conv_bn_act" if self.activation or self.norm_acts else "conv_bn"

    @property
    def identities(self) -> list[fx.Node]:
        """Returns the nodes of nn.Identity."""
        called = [node for node in self.nodes if node.op == "call_module"]
        return [node for node in called if node not in (self.conv, self.norm, self.activation)]

    @property
    def input(self) -> fx.Node:
        return cast(fx.Node, (self.conv or self.norm).args[0])

    @property
    def parts(self) -> tuple[str, ...]:
        """Returns the paths of the children that are bypassed."""
        return tuple(dict.fromkeys(str(node.target) for node in self.nodes if node.op == "call_module"))

    @property
    def home(self) -> Path:
        """Returns the innermost module whose forward contains the whole chain."""
        scopes = [node.meta["scope"] for node in self.nodes]
        same = 0
        while all(scope[: same + 1] == scopes[0][: same + 1] and len(scope) > same for scope in scopes):
            same += 1
        return scopes[0][:same]


def find_chains(module: nn.Module, graph: fx.Graph, check_conv=conv_obstacle) -> list[Chain | Refusal]:
    """Finds the chains in graph order; returns a Refusal for what looks like a chain but is not one.

    check_conv: returns why a convolution cannot be part of one, or an empty string.
    """
    return list(_Finder(module, graph, check_conv).found())


class _Finder:
    def __init__(self, module, graph, check_conv):
        self.module, self.nodes, self.check_conv = module, list(graph.nodes), check_conv
        self.children = {n: module.get_submodule(n.target) for n in self.nodes if n.op == "call_module"}
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.depth: dict[fx.Node, int] = {}
        for node in self.nodes:
            self.depth[node] = 1 + max((self.depth[source] for source in node.all_input_nodes), default=0)
        self.called = Counter(id(self.child(node)) for node in self.nodes if node.op == "call_module")
        self.taken: set[fx.Node] = set()

    def found(self) -> Iterator[Chain | Refusal]:
        chains = []
        # if two chains are added, the later one takes the other as its residual
        norms = [node for node in reversed(self.nodes) if isinstance(self.child(node), NORMS)]
        for norm in sorted(norms, key=self.depth.__getitem__, reverse=True):
            chain = self.grow(norm)
            if chain is not None:
                chain.nodes.sort(key=self.place.get)
                self.taken.update(chain.nodes)
                chains.append(chain)
        for chain in sorted(chains, key=lambda chain: self.place[chain.norm]):
            reason = self.obstacle(chain)
            yield Refusal(reason, chain.parts) if reason else chain

    def grow(self, norm):
        chain = Chain(norm, nodes=[norm])
        back = self.back(norm.args[0]) if norm.args else None
        if back is not None:
            chain.conv, chain.residuals, chain.scale, before = back
            chain.nodes += before
            chain.post_norm = not chain.residuals
        chain.norm_acts = act_of_norm(self.child(norm)) is not None
        if not chain.norm_acts:
            self.forth(chain)
        return None if chain.pattern == "bn_act" and not (chain.activation or chain.norm_acts) else chain

    def back(self, node, residuals=0, scaled=False):
        """Returns (conv, residuals, scale, nodes) of what ends in `node`; residuals, scaled: what was passed so far."""
        if not isinstance(node, fx.Node) or len(node.users) != 1 or node in self.taken:
            return None
        if isinstance(self.child(node), _ConvNd):
            return (node, [], 1.0, [node]) if residuals or not scaled else None
        if scaled:
            return None
        steps: list[tuple[Any, list, float]]
        if self.is_identity(node):
            steps = [(node.args[0], [], 1.0)]
        elif (factor := _factor(node)) is not None and residuals:
            steps = [(node.args[factor[0]], [], factor[1])]
        elif (pair := _summands(node)) is not None and residuals < 2:
            steps = [(pair[0], [pair[1]], 1.0)]
            if not written_arguments(node):
                steps.append((pair[1], [pair[0]], 1.0))
        else:
            return None
        for inner, residual, factor in steps:
            found = self.back(inner, residuals + len(residual), factor != 1.0)
            if found is not None:
                conv, others, scale, nodes = found
                return conv, others + residual, scale * factor, [*nodes, node]
        return None

    def forth(self, chain):
        """Adds what follows the norm, up to the activation."""
        node, passed, scale = chain.norm, [], 1.0
        while len(node.users) == 1:
            before, node = node, next(iter(node.users))
            if node in self.taken:
                return
            passed.append(node)
            pair = _summands(node)
            if self.is_activation(node):
                if scale == 1.0:
                    chain.activation = node
                    chain.nodes += passed
                return
            if self.is_identity(node):
                continue
            if (factor := _factor(node)) is not None and scale == 1.0 and not chain.residuals:
                scale = factor[1]
            elif pair is not None and chain.conv is not None and not chain.residuals and before in pair:
                other = pair[1] if pair[0] is before else pair[0]
                # in place on another tensor: its other users would miss the sum
                if written_arguments(node) and pair[0] is not before:
                    return
                chain.residuals, chain.scale, scale = [other], scale, 1.0
                chain.nodes += passed
                passed = []
            else:
                return

    def obstacle(self, chain):
        """Returns why the chain may not become one operation."""
        norm, conv = self.child(chain.norm), chain.conv and self.child(chain.conv)
        if conv is not None and (reason := self.check_conv(conv)):
            return reason
        if reason := norm_obstacle(norm):
            return reason
        if (
            chain.activation is not None
            and chain.activation.op == "call_module"
            and (reason := activation_obstacle(self.child(chain.activation)))
        ):
            return reason
        if self.called[id(norm)] > 1:
            return "its norm is called more than once in a forward"
        if any(len(node.args) != 1 or node.kwargs for node in (chain.norm, conv and chain.conv) if node):
            return "it is called with more than one argument"
        if not isinstance(chain.input, fx.Node):
            return f"it is called with a constant, a {type(chain.input).__name__}"
        return self.conflict(chain)

    def conflict(self, chain):
        """Returns why its parts cannot all run where the last one is: nodes in between would see the difference."""
        memory, inside = self.memory, set(chain.nodes)
        first, last = (self.place[node] for node in (chain.nodes[0], chain.nodes[-1]))
        read, changed = set(), set()  # by the parts so far
        for node in self.nodes[first : last + 1]:
            if node in inside:
                read |= memory.given(source for source in node.all_input_nodes if source not in inside)
                if node.op == "call_module":
                    read |= tensors_of(self.child(node))
                if node is chain.norm:
                    changed = statistics_of(self.child(node))
            elif changed & memory.used(node):
                return f"{node.name}, between its parts, reads or changes the statistics of its norm"
            elif read & memory.written(node):
                return f"{node.name}, between its parts, may change in place what they read"
        handed = memory.given([chain.input, *chain.residuals])
        return "it takes in the statistics of its norm" if handed & changed else ""

    @functools.cached_property
    def memory(self):
        return Memory(self.module, self.nodes)

    def child(self, node):
        return self.children.get(node)

    def is_identity(self, node):
        return type(self.child(node)) is Identity and len(node.args) == 1 and not node.kwargs

    def is_activation(self, node):
        if node.op == "call_module":
            return isinstance(self.child(node), KINDS)
        return activation_of_call(node) is not None


def _operands(node, functions, methods):
    """Returns the two operands if node is one of these, without further options."""
    known = (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    )
    return node.args if known and len(node.args) == 2 and not node.kwargs else None


def _summands(node):
    pair = _operands(node, _ADD, ("add", "add_"))
    # x + x has no separate residual
    return pair if pair is not None and all(isinstance(a, fx.Node) for a in pair) and pair[0] is not pair[1] else None


def _factor(node):
    """Returns (which operand is the tensor, the number it is multiplied by)."""
    pair = _operands(node, _MULTIPLY, ("mul", "mul_"))
    if pair is not None:
        for i in (0, 1):
            if isinstance(pair[i], fx.Node) and type(pair[1 - i]) in (int, float):
                return i, float(pair[1 - i])
    return None
