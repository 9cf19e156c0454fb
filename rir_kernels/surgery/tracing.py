"""Traces one module's forward to a graph with opaque children, and records everything the graph depends on.

torch.fx runs forward once with placeholders. Python decisions in forward are baked into the graph, so what they read is
recorded (`Read`) and checked again at every call. What a graph cannot represent stops the trace: a forward that takes
another path in evaluation or without gradients, draws random numbers, makes tensors, sets attributes, asks for the type
of a value, or runs a part of itself under another mode (no_grad, autocast, checkpointing).
"""

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx, nn

from ..common.fused_class import class_of
from .outside import Outside
from .reads import Read, child, holds
from .recording import Untraceable, refuse, session
from .reuse import answers, likeness, serves_others
from .tracer import Tracer, first_line, surroundings


class Trace(NamedTuple):
    """A graph and what it depends on.

    inputs: the names of forward's arguments without a default; the others had their defaults. asks_mode: whether an
    inlined forward reads `training`. asks_which: whether code that ran may compare children by identity or ask for
    their class. outside: what else the graph depends on, such as torch's answers, which have `arguments`.
    """

    graph: fx.Graph
    reads: tuple[Read, ...]
    outside: tuple[Outside, ...]
    inputs: tuple[str, ...]
    asks_mode: bool
    asks_which: bool = False


def trace(module: nn.Module, inlined: frozenset[str] = frozenset()) -> Trace:
    """Traces type(module).forward. `inlined`: paths ("a.b") of children whose forward is traced as well.

    node.meta["scope"], a Path, gives the module in whose forward a node is. In a `session`, similar modules share one
    graph, which must not be changed. Raises Untraceable; the module stays unchanged. Meanwhile other threads should
    neither run the module, whose mode changes temporarily, nor draw random numbers.
    """
    traces = trace_modes(module, inlined)
    first = traces[0]
    if len(traces) == 1:
        return first
    if len({_code(trace.graph) for trace in traces}) > 1:
        refuse("its forward is another one in evaluation, or without gradients")
    reads = dict.fromkeys(read for trace in traces for read in trace.reads)
    outside = dict.fromkeys(one for trace in traces for one in trace.outside)
    # a question with two answers is about gradients, and the graph is the same for both
    asked = Counter(one.question for one in outside)
    outside = (one for one in outside if one.arguments is None or asked[one.question] == 1)
    which = any(trace.asks_which for trace in traces)
    return first._replace(reads=tuple(reads), outside=tuple(outside), asks_which=which)


def trace_modes(module: nn.Module, inlined: frozenset[str] = frozenset(), *, options: bool = False) -> list[Trace]:
    """Traces as `trace` does, once per mode: training and, if forward asks, evaluation; with and without gradients.

    options: also traces with the arguments that have a default given, a bool as its opposite.
    """
    traces: list[Trace] = []
    for training, gradients in itertools.product((True, False), repeat=2):
        if not training and not any(trace.asks_mode for trace in traces):
            break  # evaluation can make no difference
        if not gradients and not any(one.arguments is not None for trace in traces for one in trace.outside):
            continue  # gradients make no difference if forward asks torch for nothing
        traces.append(_trace(module, inlined, training, gradients, options))
    return traces


def sketch(module: nn.Module, inlined: frozenset[str] = frozenset()) -> fx.Graph:
    """Traces only in training mode, for a first look. Raises as `trace` does."""
    return _trace(module, inlined, training=True, gradients=True).graph


def _trace(module, inlined, training, gradients, options=False):
    with session() as known, torch.set_grad_enabled(gradients):
        alike = likeness(module)
        kind = class_of(module)
        traced = known[kind, kind.forward, inlined, training, options, surroundings()]
        for trace, only, built, found in traced:
            same = built == alike and found == answers(module, trace.reads) and only in (None, module)
            if same and all(one.holds() for one in trace.outside):
                return trace
        with _mode(module, inlined, training):
            trace = _trace_anew(module, inlined, options)
        only = None if serves_others(trace, module) else module
        traced.append((trace, only, alike, answers(module, trace.reads)))
        return trace


def _trace_anew(module, inlined, options):
    try:
        with _without_random_numbers():
            tracer = Tracer(module, inlined, options)
            graph = tracer.run()
        if tracer.watch.doubts:
            refuse(tracer.watch.doubts[0])
        reads, outside = tuple(dict.fromkeys(tracer.reads)), tracer.watch.found
        # for example whether torch.fx traces
        for read in reads:
            if (owner := child(module, read.path)) is None or not holds(owner, read):
                refuse(f"its forward reads {read.name!r}, which is another while it is traced")
        for name in (one.name for one in outside if not one.holds()):
            refuse(f"its forward asks for {name!r}, which is another while it is traced")
    except (Untraceable, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Untraceable(f"its forward cannot be traced: {first_line(error)}") from None
    return Trace(graph, reads, outside, tracer.inputs, tracer.asks_mode, tracer.watch.asks_which)


@contextlib.contextmanager
def _without_random_numbers():
    """Refuses forwards that draw random numbers, which would become constants; restores the generators' states."""
    numpys: Callable[[], Any] = np.random.get_state  # typed so, as it can also return a dict
    python, numpy, torchs = random.getstate(), numpys(), torch.get_rng_state()
    try:
        yield
        drawn = random.getstate() != python or not torch.equal(torch.get_rng_state(), torchs)
        drawn |= numpys()[2:] != numpy[2:]  # each draw moves the position
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torchs)
    if drawn:
        refuse("its forward draws random numbers")


@contextlib.contextmanager
def _mode(module, inlined, training):
    """Puts the modules whose forward is traced into one mode."""
    modules = [module, *(module.get_submodule(path) for path in inlined)]
    modes = [m.training for m in modules]
    try:
        for m in modules:
            object.__setattr__(m, "training", training)  # bypasses a module's own __setattr__
        yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            object.__setattr__(m, "training", mode)


def _code(graph):
    return graph.python_code("self").src
