"""Nothing is timed that is not right: every variant is judged on the very shape, by `compare`'s error budget."""

import dataclasses
import math

from rir_kernels.equivalence import EquivalenceRow


@dataclasses.dataclass(frozen=True)
class Verdict:
    passed: bool
    budget_used: float | None  # the largest part of an error budget that a tensor used
    error: str | None = None
    note: str | None = None


def verdict(rows: list[EquivalenceRow]) -> Verdict:
    """The worst of the rows speaks for all."""
    worst = max(rows, key=lambda row: (not row.passed, row.used))
    used = worst.used if math.isfinite(worst.used) else None
    failed = [row for row in rows if not row.passed]
    if not failed:
        blind = sum("blind" in row.note for row in rows)
        return Verdict(True, used, note=f"{blind} of {len(rows)} tensors blind to faults" if blind else None)
    found = f"{worst.kind} {worst.name}: " + (
        f"error {worst.error_max:.2e}, budget {worst.budget:.2e}" if worst.budget is not None else worst.note
    )
    return Verdict(False, used, f"gate: {len(failed)} of {len(rows)} tensors beyond their error budgets; {found}")
