"""Finds the uses of a convolution and its norm in a model: what every forward calls and reads, as far as known.

A traceable forward shows them in its graph. An untraceable one, and a hook, are judged by what they hold and by the
names in their code. What is not part of the model (a method that only its user calls) is not seen.
"""

import operator
from collections import Counter, defaultdict
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..common.fused_class import class_of
from ..common.tables import THE_MODEL
from .folded_norm import FoldedNorm
from .reach import asks_types, held_by, held_within, loads, name_that_reaches
from .reads import child
from .recording import Untraceable
from .tracer import options_of
from .tracing import Trace, trace_modes

_CHANGED = {"weight", "bias", "_parameters"}  # of a convolution into which a norm is folded
_CALL_THEIR_CHILDREN = ("torch.nn.", "rir_kernels.")  # and do nothing else with them: Sequential, RiRBlock
_NAMES = _CHANGED | {"running_mean", "running_var", "num_batches_tracked"}


class Pair(NamedTuple):
    """A norm to be replaced, and the convolution whose parameters change, if there is one.

    forwards: the modules in whose forwards the two are called, the outermost first. traces: of the outermost, with the
    others inlined; none if its class is known.
    """

    norm: nn.Module
    conv: nn.Module | None
    forwards: tuple[nn.Module, ...]
    traces: tuple[Trace, ...] = ()

    @property
    def parts(self) -> set[nn.Module]:
        return {part for part in (self.norm, self.conv, *self.forwards[1:]) if part is not None}

    @property
    def tensors(self) -> list:
        """Returns the tensors that change."""
        return [p for p in self.conv._parameters.values() if p is not None] if self.conv is not None else []


class Seen(NamedTuple):
    """What a forward does with the modules in its reach: how often it calls each, and which attributes it reads."""

    called: Counter[nn.Module]
    asked: dict[nn.Module | None, set[str]]


class Users:
    """The forwards and hooks of one model."""

    def __init__(self, model: nn.Module):
        self.names = {module: name for name, module in model.named_modules()}
        self.places = defaultdict(list)  # the names of a child, parameter or buffer, one per owner
        for module, name in self.names.items():
            for table in (module._modules, module._parameters, module._buffers):
                for attribute, value in table.items():
                    self.places[id(value)].append(f"{name}.{attribute}" if name else attribute)
        self.held = {module: held_by(module, self.names) for module in self.names}
        self.seen: dict[nn.Module, Seen | str] = {}
        self.loads: dict[tuple, list] = {}
        self.asked_for: dict[nn.Module, set[nn.Module]] = {}
        self.reached: dict[nn.Module, set[int]] = {}

    def other_use(self, pair: Pair) -> str:
        """Returns what, other than the chain itself, would notice that the pair is folded; or an empty string."""
        for part in (pair.norm, pair.conv, *pair.tensors):
            if part is not None and len(self.places[id(part)]) > 1:
                return f"it, or a parameter of it, has several names: {', '.join(self.places[id(part)])}"
        if pair.traces:
            seen = _seen(pair.forwards[0], pair.traces)
            if reason := self.use_in(pair, seen, pair.forwards[0]) or self.alternative(pair, seen):
                return reason
        ids = {id(one) for one in (pair.norm, pair.conv, *pair.tensors) if one is not None}
        for module in self.names:
            outside = module is not pair.norm and module is not pair.conv
            if outside and ids & self.reach(module) and (reason := self.use_by(pair, module)):
                return reason
        return ""

    def use_by(self, pair, module):
        """Returns a use by the module's hooks, or by a forward that is not the pair's."""
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if reason := self.use_of_code(pair, module, hook, held_within([hook], self.names)):
                return f"a hook on {self.title(module)} {reason}"
        if type(module).forward is nn.Module.forward:
            return ""
        if pair.norm in self.norms_asked_for(module):
            return f"the forward of {self.title(module)} asks of which class {self.title(pair.norm)} is"
        if module in pair.forwards:
            return ""
        if module not in self.seen:
            self.seen[module] = _look(module)
        seen = self.seen[module]
        if isinstance(seen, Seen):
            return self.use_in(pair, seen, module)
        held = [*module._modules.values(), *module._parameters.values(), *self.held[module]]
        if reason := self.use_of_code(pair, module, class_of(module), held):
            return f"the forward of {self.title(module)} {reason}, and {seen}"
        return ""

    def use_in(self, pair, seen, module):
        """Returns a use in a traced forward."""
        own = module is pair.forwards[0]
        if pair.conv is not None:
            for part in (pair.conv, pair.norm) if own else pair.parts:
                if seen.called[part] > own:
                    how = "called more than once" if own else "also called"
                    return f"{self.title(part)} is {how} in the forward of {self.title(module)}"
        asked = [(pair.norm, name) for name in seen.asked.get(pair.norm, ())]
        asked += [(pair.conv, name) for name in seen.asked.get(pair.conv, ()) if name in _CHANGED]
        if asked:
            part, name = min(asked, key=operator.itemgetter(1))
            return f"{name!r} of {self.title(part)} is read in the forward of {self.title(module)}"
        return ""

    def alternative(self, pair, seen):
        """Returns a conv or norm that forward may call instead of one of the pair, by an attribute or an argument."""
        for module in pair.forwards if pair.conv is not None else ():
            for found in _not_called(module, seen):
                if any(isinstance(one, _NormBase | _ConvNd) for one in found.modules()):
                    return f"the forward of {self.title(module)} may call {self.title(found)} in its place"
        return ""

    def use_of_code(self, pair, module, code, held):
        """Returns a use by code that is not traced."""
        targets = {id(one) for one in (*pair.parts, *pair.tensors)}
        if any(id(one) in targets for one in held):
            return "holds it, and may use it"
        names = _NAMES | {self.names[part].rpartition(".")[2] for part in pair.parts}
        found = self.loaded(code, module)
        return name_that_reaches(found, lambda other: id(pair.norm) in self.reach(other), pair.parts, names)

    def loaded(self, code, module):
        if (code, module) not in self.loads:
            self.loads[code, module] = list(loads(code, module))
        return self.loads[code, module]

    def norms_asked_for(self, module):
        """Returns the norms whose class affects what the module's forward does."""
        if module not in self.asked_for:
            reached = self.reach(module)
            norms = [one for one in self.names if isinstance(one, _NormBase) and id(one) in reached]
            asking = asks_types(self.loaded(class_of(module), module)) and _asks_for(norms, module)
            self.asked_for[module] = {norm for norm in norms if _asks_for([norm], module)} if asking else set()
        return self.asked_for[module]

    def reach(self, module) -> set[int]:
        """Returns the modules, parameters and buffers that the module's code can reach by attributes."""
        if module not in self.reached:
            found, queue = set(), [module]
            while queue:
                one = queue.pop()
                if id(one) not in found:
                    found.add(id(one))
                    if isinstance(one, nn.Module):
                        queue += (*one._modules.values(), *one._parameters.values(), *self.held.get(one, ()))
            self.reached[module] = found
        return self.reached[module]

    def title(self, module) -> str:
        return self.names[module] or THE_MODEL


def _look(module) -> Seen | str:
    """Returns what the module's forward does, with opaque children, or why that is unknown."""
    kind = class_of(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if kind.forward.__module__.startswith(_CALL_THEIR_CHILDREN):
        return Seen(Counter(module._modules.values()), {})
    try:
        given = trace_modes(module, options=True) if options_of(module) else []
        return _seen(module, trace_modes(module) + given)
    except Untraceable as reason:
        return str(reason)


def _asks_for(norms, module) -> bool:
    """Whether the forward differs if the norms are FoldedNorms."""
    kinds, graphs = [type(norm) for norm in norms], []
    try:
        for now in (kinds, [FoldedNorm] * len(norms)):
            for norm, kind in zip(norms, now, strict=True):
                object.__setattr__(norm, "__class__", kind)
            graphs.append([str(trace.graph) for trace in trace_modes(module)])
    except Untraceable:
        return len(graphs) == 1
    finally:
        for norm, kind in zip(norms, kinds, strict=True):
            object.__setattr__(norm, "__class__", kind)
    return graphs[0] != graphs[1]


def _seen(module, traces):
    called: Counter[nn.Module] = Counter()
    asked = defaultdict(set)
    for trace in traces:
        calls = [node.target for node in trace.graph.nodes if node.op == "call_module"]
        called |= Counter(map(module.get_submodule, calls))  # the maximum over the traces
        for read in trace.reads:
            asked[child(module, read.path)].add(read.name)
    return Seen(called, asked)


def _not_called(module, seen):
    """Yields the children that a forward does not call, including those in a list of modules."""
    for found in module._modules.values():
        if found is None or seen.called[found]:
            continue
        if not any(seen.called[one] for one in found.modules()):
            yield found
        elif type(found).forward is nn.Module.forward:
            yield from _not_called(found, seen)
