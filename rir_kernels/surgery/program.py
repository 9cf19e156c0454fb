"""The fused forward of one traced module, as source text, and what has to hold for it at every call.

Text, so that a fused module can be pickled and its forward read: classes and functions in it are imported by name.
"""

import builtins
import functools
import hashlib
import inspect
import linecache
import re
import sys
import types
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.graph import _custom_builtins
from torch.fx.node import _get_qualified_name

from . import in_place, units
from .chains import Chain
from .guards import bypass_obstacle, call_obstacle
from .tracing import Path, Read, Trace, Untraceable, child, holds


@dataclass(frozen=True)
class Program:
    """inputs: names of forward's arguments. untouched: the children whose forward is not called, with their classes.

    Convolutions, norms and ReLUs are not among them: `units` looks at those, and calls them where it must.
    """

    source: str
    inputs: tuple[str, ...]
    untouched: tuple[tuple[Path, type], ...]
    reads: tuple[Read, ...]

    def obstacle(self, module: nn.Module) -> str:
        """Why the original forward must be run."""
        for path, kind in self.untouched:
            if reason := bypass_obstacle(child(module, path), kind):
                return reason
        compiling = torch.compiler.is_compiling()
        for read in self.reads:
            owner = child(module, read.path)
            if compiling:
                _ = getattr(owner, read.name, None)  # a look-up leaves a guard, one in the instance's dict none
            if owner is None or not holds(owner, read):
                return f"{'.'.join((*read.path, read.name))} has changed"
        return ""

    def forward(self, original: type):
        """The forward of a fused class."""
        fused, inputs = _compiled(self.source), self.inputs

        @functools.wraps(original.forward)
        def forward(module, *args, **kwargs):
            named = inputs[len(args) :]
            given = args
            if kwargs and kwargs.keys() == set(named):
                given = (*args, *(kwargs[name] for name in named))
            if len(given) != len(inputs) or call_obstacle(*given) or self.obstacle(module):
                return original.forward(module, *args, **kwargs)
            return fused(module, *given)

        return forward


def write_program(module: nn.Module, trace: Trace, chains: list[Chain], inlined: frozenset[str]) -> Program:
    """The program for these chains of the trace; the trace itself is left as it is."""
    graph, copies = fx.Graph(), {}
    graph.output(graph.graph_copy(trace.graph, copies))
    for node in graph.nodes:
        node.target = in_place.FUNCTIONS.get(node.target, node.target)
    for chain in chains:
        _replace(graph, chain, copies)
    names = inlined | {node.target for chain in chains for node in chain.identities}
    untouched = tuple((tuple(name.split(".")), type(module.get_submodule(name))) for name in sorted(names))
    return Program(_source(graph), trace.inputs, untouched, trace.reads)


def _replace(graph, chain, copies):
    last = copies[chain.nodes[-1]]
    with graph.inserting_before(last):
        x, norm = copies[chain.input], graph.get_attr(chain.norm.target)
        options = {"impl": graph.get_attr("_rir_fusion.impl")}  # of the class, see swap.Recipe
        act = None if chain.relu is None else "relu"
        if chain.relu is not None and chain.relu.op == "call_module":
            act = graph.get_attr(chain.relu.target)
        if chain.conv is None:
            fused = graph.call_function(units.bn_act, (x, norm, act), options)
        else:
            conv = graph.get_attr(chain.conv.target)
            residuals = [copies[residual] for residual in chain.residuals]
            options |= {} if chain.post_norm else {"post_norm": False}
            options |= {} if chain.scale == 1.0 else {"scale": chain.scale}
            fused = graph.call_function(units.conv_bn_act, (x, conv, norm, act, *residuals), options)
    last.replace_all_uses_with(fused)
    for node in reversed(chain.nodes):
        graph.erase_node(copies[node])
    copies[chain.nodes[-1]] = fused  # which may be what another chain takes in


def _source(graph):
    """The forward, with the imports it needs."""
    code = graph.python_code("self")
    used = [(name, value) for name, value in code.globals.items() if re.search(rf"\b{name}\b", code.src)]
    return "\n".join([*(_import(name, value) for name, value in used), "", code.src.strip(), ""])


def _import(name, value):
    if name in _custom_builtins:
        return _custom_builtins[name].import_str
    if inspect.ismodule(value):
        return f"import {value.__name__} as {name}"
    qualified = _get_qualified_name(value) if callable(value) else ""
    module, _, attribute = qualified.rpartition(".")
    if module in ("", "builtins") and getattr(builtins, attribute, None) is value:
        return f"{name} = {attribute}"
    if not module or "<" in qualified:
        raise Untraceable(f"its forward calls {value!r}, which cannot be imported by a name")
    return f"from {module} import {attribute} as {name}"


@functools.cache
def _compiled(source):
    # a module, since torch.compile looks for a function's globals by the name in them
    name = f"{__name__}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    generated = sys.modules[name] = types.ModuleType(name)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    exec(compile(source, name, "exec"), generated.__dict__)
    return generated.forward
