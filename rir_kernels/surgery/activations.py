"""Which of torch's modules, functions and methods compute one of the operation's activations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..common.activations import RELU, Activation, normal_form
from .classes import know, of_torch


@dataclass(frozen=True)
class _Known:
    """How torch spells an activation, or several that differ in options.

    kind: the module's class, whose forward calls `called` of torch.nn.functional. functions, methods: do the same.
    options: the functions' arguments after the input, with their defaults; the module's attributes have the same names.
    make: the activation for the options' values, or None if the operation has no such activation.
    """

    kind: type[nn.Module]
    called: str
    functions: tuple[Callable, ...]
    methods: tuple[str, ...]
    make: Callable[..., Activation | None]
    options: Mapping[str, object] = field(default_factory=dict)

    def of_module(self, module: nn.Module) -> Activation | None:
        return self.make(*[module.__dict__.get(name) for name in self.options])

    def of_call(self, node: fx.Node) -> Activation | None:
        given = dict(zip(self.options, node.args[1:], strict=False)) | node.kwargs
        return self.make(*[given.get(name, default) for name, default in self.options.items()])


_TABLE = (
    _Known(
        of_torch(nn.ReLU), "relu", (F.relu, F.relu_, torch.relu, torch.relu_), ("relu", "relu_"), lambda: RELU
    ),
)  # fmt: skip
_BY_KIND = {known.kind: known for known in _TABLE}
_BY_FUNCTION: dict[Any, _Known] = {function: known for known in _TABLE for function in known.functions}
_BY_METHOD: dict[Any, _Known] = {method: known for known in _TABLE for method in known.methods}
KINDS = tuple(_BY_KIND)
for _known in _TABLE:
    know(_known.kind, _known.called)


def activation_of(act) -> Activation | None:
    """Returns the activation of a module of one of the KINDS, None if it is not one of ours; or of a name or a pair."""
    if act is None or isinstance(act, str | tuple):
        return normal_form(act)
    return _BY_KIND[type(act)].of_module(act)


def activation_of_call(node: fx.Node) -> Activation | None:
    """Returns the activation that a node computes by a function or a method."""
    target: Any = node.target
    known = (_BY_FUNCTION if node.op == "call_function" else _BY_METHOD).get(target)
    return None if known is None else known.of_call(node)
