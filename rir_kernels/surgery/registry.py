"""What is known of other people's classes. They are named, not imported: no instance is there without its library."""

import inspect

from torch import nn

from .swap import is_fused

# classes whose forward is looked into where a chain crosses its border
_inlined: set[str | type] = set()
# norms with an activation inside: the names of the children (activation, something that must be nn.Identity)
_norm_acts: dict[str, tuple[str, str]] = {}


def inline(*classes: str | type) -> None:
    """Classes, or their full names."""
    _inlined.update(classes)


def not_inlined(kind: type) -> None:
    """Takes `inline` back."""
    _inlined.discard(kind)


def norm_act(name: str, *, activation: str, nothing: str) -> None:
    """A subclass of BatchNorm2d that calls these children after the norm."""
    _norm_acts[name] = activation, nothing


def is_inlined(module: nn.Module) -> bool:
    """Whether its forward is looked into, as part of that of the module around it."""
    kind = type(module)
    if is_fused(module):
        return False
    return calls_in_turn(kind) or kind in _inlined or full_name(kind) in _inlined


def forward_of(kind: type):
    """The class's forward as it stands there: on scripted classes, looking it up otherwise raises."""
    return inspect.getattr_static(kind, "forward")


def calls_in_turn(kind: type) -> bool:
    """Whether its forward is nn.Sequential's: one child after the other."""
    return forward_of(kind) is nn.Sequential.forward


def is_never_called(kind: type) -> bool:
    """Whether it has no forward, as nn.ModuleList and nn.ModuleDict: others call its children."""
    return forward_of(kind) is nn.Module.forward


def activation_within(norm: nn.Module) -> tuple[nn.Module | None, nn.Module | None] | None:
    """The activation and what must be nothing, of a norm of such a kind; None for all others."""
    names = _norm_acts.get(full_name(type(norm)))
    if names is None:
        return None
    activation, nothing = names
    return norm._modules.get(activation), norm._modules.get(nothing)


def full_name(kind: type) -> str:
    """As it is imported."""
    return f"{kind.__module__}.{kind.__qualname__}"
