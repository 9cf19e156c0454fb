"""The fused forward of one traced module, as source text, and what must hold for it at every call.

It is text so that a fused module can be pickled and its forward read; it imports classes and functions by name.
"""

import builtins
import functools
import hashlib
import inspect
import linecache
import operator
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import fx, nn
from torch.fx.graph import _custom_builtins
from torch.fx.node import _get_qualified_name

from ..common.activations import Activation
from . import in_place, runtime
from .activations import activation_of_call
from .bypass import bypass_obstacle, call_obstacle
from .classes import Method, methods_of
from .fallback import note
from .granted import Granted, granted
from .matching import Chain
from .outside import Outside
from .pattern_names import pattern_name
from .reads import Path, Read, child, holds, is_of_the_class, path_of
from .recording import Untraceable
from .tracing import Trace

_ONE_BY_ONE = "_rir_one_by_one_"
_OTHER_ARGUMENTS = "it was called with other arguments than its forward was traced with"


class Operation(NamedTuple):
    """One fused operation and the paths of its modules; activation: its name for a function, None for none."""

    pattern: str
    conv: Path | None
    norm: Path
    activation: Path | str | None

    def obstacle(self, module: nn.Module) -> str:
        """Returns why it would run unfused now, by the generated forward's checks; or an empty string."""
        activation = self.activation
        acts = isinstance(activation, tuple)
        act = child(module, activation) if isinstance(activation, tuple) else activation
        convs = () if self.conv is None else (child(module, self.conv),)
        return runtime.obstacle(child(module, self.norm), act, *convs, acts=acts)


@dataclass(frozen=True)
class Program:
    """A generated forward and its guards.

    inputs: names of forward's arguments. untouched: the children whose forward is not called, with their classes;
    without convolutions, norms and activations, which `runtime` checks, and calls if needed.
    """

    source: str
    inputs: tuple[str, ...]
    untouched: tuple[tuple[Path, type], ...]
    reads: tuple[Read, ...]
    outside: tuple[Outside, ...]
    granted: Granted
    operations: tuple[Operation, ...] = ()

    def obstacle(self, module: nn.Module) -> str:
        """Returns why the original forward must run, or an empty string."""
        for path, kind in self.untouched:
            if reason := bypass_obstacle(child(module, path), kind):
                return f"{'.'.join(path)}: {reason}"
        compiling = torch.compiler.is_compiling()
        for read in self.reads:
            owner = child(module, read.path)
            if compiling:
                # a look-up makes torch.compile add a guard, one in the instance's dict doesn't
                _ = hasattr(owner, read.name) and getattr(owner, read.name, None)
            if owner is None or not holds(owner, read):
                return f"{'.'.join((*read.path, read.name))} has changed"
        for one in self.outside:
            if not one.holds():
                return f"{one.name} has changed"
        return self.granted.obstacle(module)

    def states(self, module: nn.Module) -> list[tuple[str, str]]:
        """Returns what Fused._rir_operations does."""
        reason = self.obstacle(module)
        # programs pickled by version 0.1 have codes
        return [(pattern_name(one.pattern), reason or one.obstacle(module)) for one in self.operations]

    def methods(self, original: type) -> tuple[Method, ...]:
        """Returns the current methods that the source replaces: forwards, and methods and properties they called."""
        kinds = {(): original} | {path: kind for path, kind in self.untouched}
        called = {(path, "forward") for path in kinds}
        called |= {(read.path, read.name) for read in self.reads if is_of_the_class(read) and read.path in kinds}
        return tuple(method for path, name in sorted(called) for method in methods_of(kinds[path], name))

    def forward(self, original: type[nn.Module]):
        """Returns the forward of a fused class."""
        fused, inputs = _compiled(self.source).forward, self.inputs

        @functools.wraps(original.forward)
        def forward(module, *args, **kwargs):
            named = inputs[len(args) :]
            others = len(args) + len(kwargs) != len(inputs) or any(name not in kwargs for name in named)
            given = args if others else (*args, *(kwargs[name] for name in named))
            asked = _OTHER_ARGUMENTS if others else call_obstacle(*given)
            if reason := asked or self.obstacle(module):
                note(module, (*args, *kwargs.values()), reason, asked=bool(asked))
                return original.forward(module, *args, **kwargs)
            return fused(module, *given)

        return forward

    def helpers(self) -> dict[str, Callable]:
        """Returns the methods of a fused class that its forward calls."""
        return {name: f for name, f in vars(_compiled(self.source)).items() if name.startswith(_ONE_BY_ONE)}


def write_program(module: nn.Module, trace: Trace, chains: list[Chain], inlined: frozenset[str]) -> Program:
    """Writes the program for these chains of the trace, without changing the trace."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    root = graph.placeholder("self")
    graph.output(graph.graph_copy(trace.graph, copies))
    helpers = {f"{_ONE_BY_ONE}{i}": _one_by_one(chain) for i, chain in enumerate(chains)}
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        # the class has it, see class_swap.Recipe
        impl = graph.call_function(getattr, (graph.call_function(getattr, (root, "_rir_fusion")), "impl"))
    for name, chain in zip(helpers, chains, strict=True):
        _replace(graph, chain, copies, root, {"impl": impl}, name)
    functions = {"forward": graph} | helpers
    for function in functions.values():
        for node in function.nodes:
            node.target = node.name if node.op == "placeholder" else in_place.FUNCTIONS.get(node.target, node.target)
        _look_up(function, module)
    names = inlined | {str(node.target) for chain in chains for node in chain.identities}
    untouched = tuple((path_of(name), type(module.get_submodule(name))) for name in sorted(names))
    taken, operations = granted(module, trace, inlined), tuple(map(_operation, chains))
    return Program(_source(functions), trace.inputs, untouched, trace.reads, trace.outside, taken, operations)


def _operation(chain):
    conv, norm = (node and path_of(str(node.target)) for node in (chain.conv, chain.norm))
    act = chain.activation
    if act is not None:
        act = path_of(str(act.target)) if act.op == "call_module" else cast(Activation, activation_of_call(act))[0]
    return Operation(chain.pattern, conv, norm, act)


def _one_by_one(chain):
    """Builds the chain from forward's original operations, in place where they were, for the same dtypes and errors."""
    graph = fx.Graph()
    graph.placeholder("self")
    copies = {chain.input: graph.placeholder("x")}
    for i, residual in enumerate(chain.residuals):
        copies[residual] = graph.placeholder(f"residual_{i}")
    for node in chain.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[chain.nodes[-1]])
    return graph


def _replace(graph, chain, copies, root, options, one_by_one):
    last = copies[chain.nodes[-1]]
    with graph.inserting_before(last):
        x, norm = copies[chain.input], graph.get_attr(chain.norm.target)
        options = options | {"one_by_one": graph.call_function(getattr, (root, one_by_one))}
        act = chain.activation
        if act is not None and act.op == "call_module":
            act = graph.get_attr(act.target)
            options |= {"acts": True}
        elif act is not None:
            name, parameter = cast(Activation, activation_of_call(act))
            act = name if parameter is None else (name, parameter)
        if chain.conv is None:
            fused = graph.call_function(runtime.bn_act, (x, norm, act), options)
        else:
            conv = graph.get_attr(chain.conv.target)
            residuals = [copies[residual] for residual in chain.residuals]
            options |= {} if chain.post_norm else {"post_norm": False}
            options |= {} if chain.scale == 1.0 else {"scale": chain.scale}
            fused = graph.call_function(runtime.conv_bn_act, (x, conv, norm, act, *residuals), options)
    last.replace_all_uses_with(fused)
    for node in reversed(chain.nodes):
        graph.erase_node(copies[node])
    copies[chain.nodes[-1]] = fused  # may be an input of another chain


def _look_up(graph, module):
    """Looks up children, parameters and buffers by key, since some names of children are not valid in Python."""
    (root, *_) = graph.nodes
    children, dicts = {(): root}, {}

    def found(path):
        """Returns the node of the child at `path`, which is looked up once."""
        if path not in children:
            owner = found(path[:-1])
            if owner not in dicts:
                dicts[owner] = graph.create_node("call_function", getattr, (owner, "_modules"), name="modules")
            key = (dicts[owner], path[-1])
            children[path] = graph.create_node("call_function", operator.getitem, key, name=f"{path[-1]}_module")
        return children[path]

    for node in [node for node in graph.nodes if node.op in ("get_attr", "call_module")]:
        path = path_of(node.target)
        with graph.inserting_before(node):
            if node.op == "call_module":
                value = graph.call_function(runtime.call, (found(path), *node.args), dict(node.kwargs))
            elif child(module, path) is not None:
                value = found(path)
            else:
                value = graph.call_function(runtime.attribute, (found(path[:-1]), path[-1]))
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def _source(graphs):
    """Returns the source of these functions, with the imports they need."""
    used: dict[str, object] = {}
    functions = []
    for function, graph in graphs.items():
        code = graph.python_code("self")
        functions.append(code.src.strip().replace("def forward(", f"def {function}(", 1))
        for name, value in code.globals.items():
            if re.search(rf"\b{name}\b", code.src) and used.setdefault(name, value) is not value:
                raise Untraceable(f"its forward calls two functions that go by the name {name}")
    return "\n".join([*(_import(name, value) for name, value in used.items()), "", "\n\n".join(functions), ""])


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
    # a module, since torch.compile finds a function's globals by the __name__ in them
    name = f"{__name__}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    generated = sys.modules[name] = types.ModuleType(name)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    exec(compile(source, name, "exec"), generated.__dict__)
    return generated
