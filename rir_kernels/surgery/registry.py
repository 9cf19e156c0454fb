"""Registry of other libraries' classes, by name, not imported: an instance exists only if its library is imported."""

import inspect

from torch import nn

from .class_swap import is_fused

# classes whose forward is inlined if a chain crosses its boundary
_inlined: set[str | type] = set()
# norms with an activation inside: the names of the children (activation, something that must be nn.Identity)
_norm_acts: dict[str, tuple[str, str]] = {}


def inline(*classes: str | type) -> None:
    """Registers classes, or their full names, to be inlined."""
    _inlined.update(classes)


def not_inlined(kind: type) -> None:
    """Undoes `inline`."""
    _inlined.discard(kind)


def norm_act(name: str, *, activation: str, nothing: str) -> None:
    """Registers a subclass of BatchNorm2d that calls these children after the norm."""
    _norm_acts[name] = activation, nothing


def is_inlined(module: nn.Module) -> bool:
    """Whether its forward is inlined in that of the module around it."""
    kind = type(module)
    if is_fused(module):
        return False
    return calls_in_turn(kind) or kind in _inlined or full_name(kind) in _inlined


def forward_of(kind: type):
    """Returns the class's forward without getattr, which raises on scripted classes."""
    return inspect.getattr_static(kind, "forward")


def calls_in_turn(kind: type) -> bool:
    """Whether its forward is nn.Sequential's: one child after the other."""
    return forward_of(kind) is nn.Sequential.forward


def is_never_called(kind: type) -> bool:
    """Whether it has no forward, as nn.ModuleList and nn.ModuleDict: others call its children."""
    return forward_of(kind) is nn.Module.forward


def activation_within(norm: nn.Module) -> tuple[nn.Module | None, nn.Module | None] | None:
    """Returns a registered norm's activation and the child that must be nn.Identity; None for other norms."""
    names = _norm_acts.get(full_name(type(norm)))
    if names is None:
        return None
    activation, nothing = names
    return norm._modules.get(activation), norm._modules.get(nothing)


def full_name(kind: type) -> str:
    """Returns the qualified name by which the class is imported."""
    return f"{kind.__module__}.{kind.__qualname__}"
