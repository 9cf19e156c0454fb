"""Which times may be set against each other: a case's rows, their ratios, and means of those."""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

from bench.schema import IMPLS, MODES, OURS, SUITES, Row


class Ratio(NamedTuple):
    """How many times as fast as a peer ours is, and whether both ran in a CUDA graph or both eagerly."""

    value: float
    graph: bool


def finite(value: float | None) -> float | None:
    """The number, None where there is none."""
    return value if value is not None and math.isfinite(value) else None


def milliseconds(row: Row | None) -> float | None:
    """The row's median; None where it was not timed, or computes something else: its gate failed."""
    if row is None or not row.passed or not (median := finite(row.ms_median)) or median < 0:
        return None
    return median


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """The rows of one case by (impl, graph, l2)."""

    suite: str
    op: str
    shape: str
    batch: int
    dtype: str
    mode: str
    rows: dict[tuple[str, bool, str], Row]

    @property
    def group(self) -> tuple[str, str, str, str]:
        """Cases of one group differ in shape and batch alone."""
        return self.suite, self.op, self.dtype, self.mode

    def time(self, impl: str, graph: bool, l2: str = "warm") -> float | None:
        return milliseconds(self.rows.get((impl, graph, l2)))

    def graphed(self, l2: str = "warm") -> bool:
        """Is this case looked at under CUDA graphs? Yes where anything was timed so."""
        return any(milliseconds(row) for (_, graph, its), row in self.rows.items() if graph and its == l2)

    def shown(self, impl: str, l2: str = "warm") -> Row | None:
        """The row that stands for `impl`: with a time rather than without, timed as the case is rather than not."""
        own = [row for (name, _, its), row in self.rows.items() if name == impl and its == l2]
        return min(own, key=lambda row: (milliseconds(row) is None, row.graph != self.graphed(l2)), default=None)

    def ours(self) -> str | None:
        """What a user gets: "auto", failed or not; where it was not tried, the fastest of ours that has a time."""
        if any(impl == "auto" for impl, _, _ in self.rows):
            return "auto"
        shown = [row for impl in OURS if milliseconds(row := self.shown(impl))]
        best = min(shown, key=lambda row: (row.graph != self.graphed(), row.ms_median), default=None)
        return best and best.impl

    def ratio(self, peer: str) -> Ratio | None:
        """The peer's time over ours, both in CUDA graphs or else both eager, never one against the other."""
        for graph in (True, False):
            ours, theirs = self.time(self.ours(), graph), self.time(peer, graph)
            if ours and theirs:
                return Ratio(theirs / ours, graph)
        return None


def cases(rows: Iterable[Row]) -> list[Alternatives]:
    """The rows' cases, suites and modes in their own order, everything else in that of the rows."""
    found = {}
    for row in rows:
        found.setdefault(row.case, {})[row.impl, row.graph, row.l2] = row
    ops = {op: place for place, op in enumerate(dict.fromkeys(case[1] for case in found))}
    built = [
        Alternatives(suite, op, shape, batch, dtype, mode, own)
        for (suite, op, shape, batch, dtype, mode), own in found.items()
    ]

    def place(case):
        return _place(SUITES, case.suite), ops[case.op], _place(MODES, case.mode)

    return sorted(built, key=place)


def groups(found: Iterable[Alternatives]) -> dict[tuple[str, str, str, str], list[Alternatives]]:
    """Cases by (suite, op, dtype, mode)."""
    result = {}
    for case in found:
        result.setdefault(case.group, []).append(case)
    return result


def impls(found: Iterable[Alternatives], l2: str = "warm") -> list[str]:
    """The implementations that have a row in one of these cases, peers first."""
    names = dict.fromkeys(impl for case in found for impl, _, its in case.rows if its == l2)
    return sorted(names, key=lambda name: _place(IMPLS, name))


def _place(order, item):
    return order.index(item) if item in order else len(order)
