"""The result of `compare`, one row per tensor: as a text table, as HTML in a notebook, as plain data."""

import dataclasses
import html
import math

from ..common.tables import aligned, html_table

SHORT = 16  # rows; a longer report prints a summary and its worst rows
WORST = 8

_HEADER = ("", "kind", "name", "shape", "dtype", "max error", "rms error", "reference's", "budget", "channel", "note")
_RIGHT = (5, 6, 7, 8, 9)  # columns of numbers


@dataclasses.dataclass(frozen=True)
class EquivalenceRow:
    """Compares one tensor of the candidate with the fp64 golden; errors are absolute, None if it cannot be compared.

    reference_error_max is the reference's own error in its dtype, budget the limit of error_max. worst_channel: where
    the largest error is, along dimension 1 of outputs and inputs and dimension 0 of parameters and buffers.
    """

    kind: str  # "output", "input grad", "param grad" or "buffer"
    name: str
    shape: tuple[int, ...] | None
    dtype: str
    error_max: float | None
    error_rms: float | None
    reference_error_max: float | None
    budget: float | None
    worst_channel: int | None
    passed: bool
    note: str = ""

    @property
    def used(self) -> float:
        """Returns the share of the budget that the error uses; infinite if the tensor cannot be compared."""
        if not self.error_max:
            return math.inf if self.error_max is None and not self.passed else 0.0
        return self.error_max / self.budget if self.budget else math.inf

    @property
    def blind(self) -> bool:
        """Whether rounding moves the tensor so far that passing proves little."""
        return self.passed and "blind:" in self.note

    def cells(self) -> tuple[str, ...]:
        """Returns the row's cells as text."""
        numbers = (self.error_max, self.error_rms, self.reference_error_max, self.budget)
        return (
            "ok" if self.passed else "FAIL",
            self.kind,
            self.name,
            "" if self.shape is None else "x".join(map(str, self.shape)) or "scalar",
            self.dtype,
            *("" if number is None else f"{number:.1e}" if number else "0" for number in numbers),
            "" if self.worst_channel is None else str(self.worst_channel),
            self.note,
        )


@dataclasses.dataclass(frozen=True, repr=False)
class EquivalenceReport:
    """Whether a candidate is the reference's function, row by row; true if every row passed.

    print() shows all of a short report, and the summary and the worst rows of a long one; `table(full=True)` shows all.
    """

    rows: tuple[EquivalenceRow, ...]
    train: bool

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<EquivalenceReport: {self.headline()}>"

    def headline(self) -> str:
        """Returns the verdict in one line."""
        passed, blind = sum(row.passed for row in self.rows), sum(row.blind for row in self.rows)
        return (
            f"{'equivalent' if self.passed else 'NOT EQUIVALENT'} in {'train' if self.train else 'eval'} mode: "
            f"{passed} of {len(self.rows)} tensors within their budgets"
            f"{f', {blind} of them blind (rounding alone moves them far)' if blind else ''}"
        )

    def table(self, full: bool = False) -> str:
        """Returns aligned plain text; `full` includes every row of a long report."""
        if full or len(self.rows) <= SHORT:
            return "\n".join([self.headline(), "", *aligned([_HEADER, *(row.cells() for row in self.rows)], _RIGHT)])
        worst = self.worst()
        left_out = len(self.rows) - len(worst)
        return "\n".join([
            self.headline(),
            "",
            *aligned(self._summary(), (1, 2, 3)),
            "",
            *aligned([_HEADER, *(row.cells() for row in worst)], _RIGHT),
            f"... and {left_out} more rows: table(full=True)",
        ])  # fmt: skip

    def worst(self, count: int = WORST) -> list[EquivalenceRow]:
        """Returns the rows that use most of their budget, failed ones first."""
        return sorted(self.rows, key=lambda row: (row.passed, -row.used))[:count]

    def to_dict(self) -> dict:
        """Returns plain data for JSON, with None for numbers that are not finite."""
        rows = [dataclasses.asdict(row) | {"shape": row.shape and list(row.shape)} for row in self.rows]
        rows = [{key: _finite(value) for key, value in row.items()} for row in rows]
        return {"passed": self.passed, "train": self.train, "rows": rows}

    def _summary(self):
        lines = [("kind", "tensors", "passed", "error/budget", "the worst")]
        for kind in dict.fromkeys(row.kind for row in self.rows):
            rows = [row for row in self.rows if row.kind == kind]
            worst = max(rows, key=lambda row: row.used)
            passed = sum(row.passed for row in rows)
            lines.append((kind, str(len(rows)), str(passed), f"{worst.used:.2g}", worst.name))
        return lines

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self.headline())}</b></p>"]
        if len(self.rows) > SHORT:
            parts += [html_table(self._summary()), _html_rows(self.worst())]
            parts.append(f"<details><summary>all {len(self.rows)} rows</summary>{_html_rows(self.rows)}</details>")
        else:
            parts.append(_html_rows(self.rows))
        return "".join(parts)


def _html_rows(rows):
    return html_table([_HEADER, *(row.cells() for row in rows)], failed=[not row.passed for row in rows])


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
