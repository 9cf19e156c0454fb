"""What a kind of module says about itself: see Family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

PATTERNS = ("P1", "P2", "P3", "P4", "P5", "P6")


class Match(NamedTuple):
    """One fused operation: its pattern, and the names of the children that are bypassed."""

    pattern: str
    parts: tuple[str, ...]


class Refusal(NamedTuple):
    """What looks like one but has to be left alone, and why."""

    reason: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A class whose instances can be fused.

    target: the class, or None where its library has not been imported (which is never done here).
    find: what one instance has to offer, several operations where it is a container.
    mixin: the Fused whose forward runs them; at every call it looks again, by what `find` looks by.
    """

    target: Callable[[], type | None]
    find: Callable[..., list[Match | Refusal]]
    mixin: type
