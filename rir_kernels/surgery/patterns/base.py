"""What a kind of module says about itself: see Family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..swap import Fused


class Match(NamedTuple):
    """One fused operation: its pattern, and the paths of the children that are bypassed.

    inlined: paths of further children whose own forward is not called. detail: the family's own.
    """

    pattern: str
    parts: tuple[str, ...]
    inlined: tuple[str, ...] = ()
    detail: Any = None


class Refusal(NamedTuple):
    """What looks like one but has to be left alone, and why."""

    reason: str
    parts: tuple[str, ...] = ()


class Fold(NamedTuple):
    """The path of a norm that can be folded into a convolution, or where that is None into an affine map.

    inlined: paths of the children in whose forwards they are called. traces: of the forward, with these looked into;
    none for a class whose forward is known.
    """

    norm: str
    conv: str | None = None
    inlined: tuple[str, ...] = ()
    traces: tuple = ()


def no_program(module, matches) -> None:
    """The program of families whose mixin knows what to do."""


def no_folds(module) -> list[Any]:
    """Of families that know of none; so for `find` and `runs`."""
    return []


@dataclass(frozen=True)
class Family:
    """A kind of module whose instances can be fused.

    knows: whether a module's class is of that kind, and so no other family is asked; obstacle: why this class is not
    exactly one that can be fused, or an empty string.
    find: what one instance has to offer, several operations where it is a container.
    mixin: the Fused whose forward runs them; at every call it looks again, by what `find` looks by.
    program: what that forward is told, for the matches that are to be fused: hashable, part of the fused class.
    folds: the norms of one instance that `fold_bn_` may fold.
    runs: the operations that one instance runs as it is, without being fused.
    """

    knows: Callable[[type], bool]
    obstacle: Callable[[type], str]
    find: Callable[..., list[Match | Refusal]]
    mixin: type[Fused]
    program: Callable[..., Any] = no_program
    folds: Callable[..., list[Fold | Refusal]] = no_folds
    runs: Callable[..., list[Match]] = no_folds


def exactly(target: Callable[[], type | None]) -> dict:
    """knows and obstacle for one class; target: None where its library has not been imported (never done here)."""

    def knows(kind):
        known = target()
        return known is not None and issubclass(kind, known)

    def obstacle(kind):
        known: Any = target()  # a class: `knows` has been asked
        same = kind is known
        return "" if same else f"{kind.__name__} is a subclass of {known.__name__}: only the exact class is known"

    return {"knows": knows, "obstacle": obstacle}
