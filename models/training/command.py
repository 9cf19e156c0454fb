"""A run from the command line: with a bar, a clock and signals."""

import contextlib
import signal
import time

from tooling.console import say

from . import report
from .progress import TrainingProgress


def carry_out(run, *, save_every: float, minutes: float | None) -> bool:
    """Trains until the run is finished, the minutes are over, or a signal asks to stop; says what came of it.

    Whether a signal came. What belongs in run.json and curves.png is written in all cases.
    """
    first = run.ranks.first
    if first:
        say(report.headline(run))
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    with _signals() as caught, TrainingProgress(run) if first else contextlib.nullcontext() as progress:
        run.train(
            save_every=save_every,
            stop=lambda: bool(caught) or time.monotonic() >= deadline,
            progress=progress,
        )
    if first:
        report.write(run)
        say(report.closing(run))
        say(f"{run.out}" if run.finished else f"stopped; python -m models.train --resume --out {run.out} goes on")
    return bool(caught)


@contextlib.contextmanager
def _signals():
    """A list of the signals to stop that came: the first asks for an orderly end, the second ends at once."""
    caught = []

    def note(number, _):
        caught.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
