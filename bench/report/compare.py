"""Two runs on one device, row by row: what became slower, and what is no longer there."""

import dataclasses
import math
import re
from collections.abc import Iterator

from bench.report.speedup import finite, geometric_mean, milliseconds
from bench.schema import PEERS, Results, Row


@dataclasses.dataclass(frozen=True)
class Change:
    """A row that has a time in both runs."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        return self.after.ms_median / self.before.ms_median

    @property
    def within_noise(self) -> bool:
        """Do the quartile ranges overlap?"""
        (low, high), (its_low, its_high) = _quartiles(self.before), _quartiles(self.after)
        return low <= its_high and its_low <= high

    def __str__(self) -> str:
        noise = ", within noise" * self.within_noise
        return f"{_name(self.before)}: {_time(self.before)} -> {_time(self.after)} ms, x{self.ratio:.3f}{noise}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`lost` and `unmeasured` pair a row of the first run with the reason why the second has no time for it."""

    limit: float
    changes: list[Change]
    lost: list[tuple[Row, str]]
    unmeasured: list[tuple[Row, str]]
    new: list[Row]
    notes: list[str]

    @property
    def slower(self) -> list[Change]:
        """Beyond the limit, and beyond the noise: the quartile ranges have nothing in common."""
        return [change for change in self.changes if change.ratio > 1 + self.limit and not change.within_noise]

    @property
    def faster(self) -> list[Change]:
        """Likewise: the first run took longer by more than the limit, and by more than the noise."""
        return [change for change in self.changes if 1 / change.ratio > 1 + self.limit and not change.within_noise]

    @property
    def unclear(self) -> list[Change]:
        """Beyond the limit one way or the other, and within the noise."""
        beyond = (c for c in self.changes if max(c.ratio, 1 / c.ratio) > 1 + self.limit)
        return [change for change in beyond if change.within_noise]

    @property
    def failed(self) -> bool:
        """Is something slower or lost? Not so for what was not measured."""
        return bool(self.slower or self.lost)

    def means(self) -> dict[tuple[str, str, str, str], tuple[float, int]]:
        """{(suite, op, mode, impl): (geometric mean of after / before, number of rows)}"""
        ratios = {}
        for change in self.changes:
            row = change.before
            ratios.setdefault((row.suite, row.op, row.mode, row.impl), []).append(change.ratio)
        return {key: (geometric_mean(values), len(values)) for key, values in ratios.items()}

    def lines(self) -> Iterator[str]:
        """For the terminal, the verdict last."""
        yield from self.notes
        for title, changes in (("slower", self.slower), ("faster", self.faster), ("unclear", self.unclear)):
            yield from (f"{title}: {change}" for change in sorted(changes, key=lambda change: -change.ratio))
        for title, rows in (("lost", self.lost), ("not measured", self.unmeasured)):
            yield from (f"{title}: {_name(row)}: {reason}" for row, reason in rows)
        yield from (f"new: {_name(row)}: {_time(row)} ms" for row in self.new)
        for key, (mean, count) in self.means().items():
            yield f"geometric mean, {' '.join(key)}: x{mean:.3f} over {count} rows"
        counts = f"{len(self.changes)} rows compared, {len(self.slower)} slower by more than {100 * self.limit:.4g} %"
        counts += f", {len(self.faster)} faster, {len(self.lost)} lost, {len(self.unmeasured)} not measured"
        yield f"{'FAILED' if self.failed else 'passed'}: {counts}"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def compare(before: Results, after: Results, limit: float) -> Comparison:
    """Rows with the same key against each other; a row is slower or faster as `Comparison` says.

    A row that had a time and has none, or fails its gate now, is lost. It is merely not measured where `after` did not
    reach its case, did not run its suite, or lacks the peer. Raises ValueError for results of different devices.
    """
    names = [results.device.get("name", "unknown") for results in (before, after)]
    if names[0] != names[1]:
        raise ValueError(
            f"results of {names[0]!r} and of {names[1]!r}: figures of two machines cannot be compared; "
            "measure both on one"
        )
    timed = {row.key: row for row in before.rows if milliseconds(row)}
    found = {row.key: row for row in after.rows}
    changes, lost, unmeasured = [], [], []
    for key, row in timed.items():
        if milliseconds(found.get(key)):
            changes.append(Change(row, found[key]))
        elif key not in found and (reason := _not_measured(row, after)):
            unmeasured.append((row, reason))
        else:
            lost.append((row, _lost(found.get(key))))
    new = [row for row in after.rows if row.key not in timed and milliseconds(row)]
    return Comparison(limit, changes, lost, unmeasured, new, list(_notes(before, after)))


def parse_limit(text: str) -> float:
    """0.05 of "5%" or "0.05"; ValueError for anything else, and below 0."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", text)
    if not match:
        raise ValueError(f"expected a limit such as 5% or 0.05, got {text!r}")
    return float(match[1]) / (100 if match[2] else 1)


def _not_measured(row, after):
    if not any(other.suite == row.suite for other in after.rows):
        return "its suite was not run"
    if row.impl in PEERS and row.impl in after.absent:
        return f"{row.impl} is not there: {after.absent[row.impl]}"
    # a case that was not reached is written as some of its fields, in words
    words = {*row.shape.split(), row.suite, row.op, f"x{row.batch}", str(row.batch), row.dtype, row.mode, row.impl}
    if any(text.split() and words.issuperset(text.split()) for text in after.unreached):
        return "its case was not reached"
    return None


def _lost(row):
    if row is None:
        return "no such row any more"
    return row.error or "no reason was recorded"


def _notes(before, after):
    for what in ("versions", "settings"):
        first, second = getattr(before, what), getattr(after, what)
        for name in sorted({*first, *second}):
            if first.get(name) != second.get(name):
                yield f"{what} differ: {name} was {first.get(name)}, is {second.get(name)}"
    if before.sources_hash == after.sources_hash:
        yield "the code that was measured is the same in both"


def _quartiles(row):
    """The median twice where they were not recorded."""
    low, high = finite(row.ms_q1), finite(row.ms_q3)
    return (row.ms_median if low is None else low), (row.ms_median if high is None else high)


def _name(row):
    timing = f"{'graph' if row.graph else 'eager'} {row.l2}"
    return f"{row.suite} {row.op} {row.shape} x{row.batch} {row.dtype} {row.mode} {row.impl} ({timing})"


def _time(row):
    low, high = _quartiles(row)
    digits = max(0, 3 - math.floor(math.log10(row.ms_median)))
    return f"{row.ms_median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
