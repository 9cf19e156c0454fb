"""The interface of a kind of module: see Family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..class_swap import Fused


class Match(NamedTuple):
    """One fused operation: its pattern, and the paths of the children that it bypasses.

    inlined: paths of further children whose forward is not called. detail: private to the family.
    """

    pattern: str
    parts: tuple[str, ...]
    inlined: tuple[str, ...] = ()
    detail: Any = None


class Refusal(NamedTuple):
    """What looks like a match but must be left alone, and why."""

    reason: str
    parts: tuple[str, ...] = ()


class Fold(NamedTuple):
    """The path of a norm that can be folded into a convolution or, if `conv` is None, into an affine map.

    inlined: paths of the children in whose forwards they are called. traces: of the forward, with these inlined; none
    for a class whose forward is known.
    """

    norm: str
    conv: str | None = None
    inlined: tuple[str, ...] = ()
    traces: tuple = ()


def no_program(module, matches) -> None:
    """Returns no program, for families whose mixin needs none."""


def no_folds(module) -> list[Any]:
    """Returns an empty list, for families without folds; also used for `find` and `runs`."""
    return []


@dataclass(frozen=True)
class Family:
    """A kind of module whose instances can be fused.

    knows: whether a module's class is of that kind, so that no other family is asked; obstacle: why exactly this class
    cannot be fused, or an empty string.
    find: returns the operations of one instance, several if it is a container.
    mixin: the Fused whose forward runs them; at every call it checks again what `find` checks.
    program: the data of that forward for the matches to be fused: hashable, part of the fused class.
    folds: the norms of one instance that `fold_bn_` may fold.
    runs: the operations that one instance runs without being fused.
    """

    knows: Callable[[type], bool]
    obstacle: Callable[[type], str]
    find: Callable[..., list[Match | Refusal]]
    mixin: type[Fused]
    program: Callable[..., Any] = no_program
    folds: Callable[..., list[Fold | Refusal]] = no_folds
    runs: Callable[..., list[Match]] = no_folds


def exactly(target: Callable[[], type | None]) -> dict:
    """Returns knows and obstacle for one class; target returns None if its library has not been imported elsewhere."""

    def knows(kind):
        known = target()
        return known is not None and issubclass(kind, known)

    def obstacle(kind):
        known: Any = target()  # not None: `knows` has returned True
        same = kind is known
        return "" if same else f"{kind.__name__} is a subclass of {known.__name__}: only the exact class is known"

    return {"knows": knows, "obstacle": obstacle}
