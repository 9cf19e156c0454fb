"""`register_pattern`: users' registrations for their own modules."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from .. import registry
from ..bypass import bypass_obstacle, call_obstacle, conv_obstacle, norm_obstacle
from ..classes import BatchNorm2d, Conv2d, Method, methods_of
from ..fallback import note
from ..pattern_names import pattern_name
from ..reads import Path, child, path_of
from .base import Family, Match, Refusal, exactly
from .fx_traced import FusedForward

FAMILIES: dict[type, Family] = {}


def register_pattern(
    kind: type,
    *,
    pattern: str | None = None,
    parts: Mapping[str, type] | None = None,
    obstacle: Callable[[nn.Module], str] | None = None,
):
    """Registers modules whose class is exactly `kind` with fuse_.

    `register_pattern(ConvNorm)` lets fuse_ look into ConvNorm's forward if a chain of conv, norm, add and ReLU crosses
    its boundary, for example if the block around it adds the identity.

    With `pattern` it is a decorator for a hand-written fused forward, for modules that torch.fx cannot trace:

        @rir.register_pattern(Gate, pattern="conv_bn_add_act", parts={"conv": nn.Conv2d, "bn": nn.BatchNorm2d})
        def gate(module, x, *, impl):
            return rir.surgery.conv_bn_act(x, module.conv, module.bn, None, x, impl=impl)

    The function is called with the module, forward's own arguments and fuse_'s `impl`. It must be importable by its
    name if the fused module is to be pickled.

    Args:
        pattern: its name in the report, such as "conv_bn_act".
        parts: the children that the function bypasses, by path, with the exact class of each. Every call checks them:
            if one is not an untouched instance of its class (a hook, a parametrization), the original forward runs.
        obstacle: called in every call; returns why this instance must run its original forward, or "".

    Registering a class again replaces the earlier registration; `unregister_pattern` removes it. Modules that are
    already fused stay as they are. Raises TypeError and ValueError for invalid arguments.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a subclass of torch.nn.Module, got {kind!r}")
    if pattern is None:
        if parts is not None or obstacle is not None:
            raise ValueError("parts and obstacle belong to a fused forward: name its pattern and decorate the function")
        registry.inline(kind)
        return kind
    pattern = pattern_name(pattern)
    if not parts or not all(isinstance(part, type) and issubclass(part, nn.Module) for part in parts.values()):
        raise ValueError("parts must name the children that are bypassed, each with its class, such as nn.Conv2d")

    def register(function):
        paths = tuple((path_of(name), part) for name, part in parts.items())
        plan = _Written(function, paths, obstacle, pattern)
        FAMILIES[kind] = Family(
            **exactly(lambda: kind),
            find=functools.partial(_find, plan),
            mixin=FusedForward,
            program=lambda module, matches: plan,
        )
        return function

    return register


def unregister_pattern(kind: type) -> None:
    """Removes the registration of `kind`; does nothing if there is none."""
    FAMILIES.pop(kind, None)
    registry.not_inlined(kind)


@dataclass(frozen=True)
class _Written:
    """The program of a hand-written forward."""

    function: Callable
    parts: tuple[tuple[Path, type], ...]
    asked: Callable[[nn.Module], str] | None
    pattern: str

    @property
    def source(self) -> str:
        return inspect.getsource(self.function)

    def states(self, module) -> list[tuple[str, str]]:
        return [(self.pattern, self.obstacle(module))]

    def obstacle(self, module) -> str:
        return self.part_obstacle(module) or self.asked_obstacle(module)

    def part_obstacle(self, module) -> str:
        for path, kind in self.parts:
            if reason := _part_obstacle(child(module, path), kind):
                return f"{'.'.join(path)}: {reason}"
        return ""

    def asked_obstacle(self, module) -> str:
        return self.asked(module) if self.asked is not None else ""

    def methods(self, original: type) -> tuple[Method, ...]:
        return tuple(m for kind in dict.fromkeys(kind for _, kind in self.parts) for m in methods_of(kind, "forward"))

    def helpers(self) -> dict[str, Callable]:
        return {}

    def forward(self, original: type[nn.Module]):
        @functools.wraps(original.forward)
        def forward(module, *args, **kwargs):
            given = (*args, *kwargs.values())
            asked = call_obstacle(*given)
            reason = asked or self.part_obstacle(module)
            if not reason:
                reason = asked = self.asked_obstacle(module)
            if reason:
                note(module, given, reason, asked=bool(asked))
                return original.forward(module, *args, **kwargs)
            return self.function(module, *args, **kwargs, impl=module._rir_fusion.impl)

        return forward


def _part_obstacle(module, kind):
    if kind is Conv2d:
        return conv_obstacle(module)
    return norm_obstacle(module) if kind is BatchNorm2d else bypass_obstacle(module, kind)


def _find(plan, module):
    reason = plan.obstacle(module)
    names = tuple(".".join(path) for path, _ in plan.parts)
    return [Refusal(reason, names) if reason else Match(plan.pattern, names)]
