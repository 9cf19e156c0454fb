"""Work that is done in pieces, as far as the time goes, and continued by the next call.

A piece is a command that leaves a file behind, writes what it has as it goes, and continues what it finds. It runs in a
separate process: a crash or a hang costs the time of that piece, and the next one follows.
"""

import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tooling.process import Ended, run_limited
from tooling.sources import sources_hash

LEAST = 5.0  # seconds: with less there is no point in starting


@dataclass(frozen=True)
class State:
    """How far a piece has come, as its file tells."""

    begun: bool = False
    done: bool = False  # nothing is missing
    failed: bool = False  # something in it did
    progress: int = 0  # grows with what the file holds
    text: str = "not begun"


@functools.cache
def sources_now(kind: str, device_type: str, device_name: str) -> str:
    """`sources.sources_hash`, computed once: while pieces are worked on no source changes."""
    return sources_hash(kind, {"type": device_type, "name": device_name})


class Piece(Protocol):
    name: str
    seconds: float  # its own limit, for one call
    silent: float | None  # so long it may print nothing

    def state(self) -> State: ...

    def command(self, seconds: float, retry: bool) -> Sequence[str]:
        """Arguments of python -m bench. retry: what failed in an earlier call is to be tried again."""

    def ended(self, how: Ended) -> None:
        """Notes in its file how a process of it ended that did not come to its end."""


def work(pieces: Sequence[Piece], minutes: float) -> bool:
    """Takes the pieces in their order, those that failed in an earlier call after the others.

    Prints what it does and, at the end, how far every piece has come. Returns whether none failed.
    """
    deadline = time.monotonic() + 60 * minutes
    for piece in sorted(pieces, key=lambda piece: piece.state().failed):
        if not piece.state().done:
            _work_on(piece, min(deadline, time.monotonic() + piece.seconds))
    states = {piece.name: piece.state() for piece in pieces}
    width = max(map(len, states))
    print()
    for name, state in states.items():
        print(f"  {name:{width}}  {state.text}")
    missing = [name for name, state in states.items() if not state.done]
    print(
        f"\nmissing: {', '.join(missing)}; the same command goes on" if missing else "\nnothing is missing", flush=True
    )
    return not any(state.failed for state in states.values())


def _work_on(piece, end):
    """Starts the piece, and again after a crash as long as each start brings it forward."""
    retry = piece.state().failed
    while (left := end - time.monotonic()) > LEAST:
        before = piece.state().progress
        print(f"\n== {piece.name}: {left:.0f} s at most", flush=True)
        command = [sys.executable, "-m", "bench", *piece.command(left, retry)]
        ended = run_limited(command, left, silent=piece.silent)
        if ended.code != 0:
            piece.ended(ended)
        if ended.code == 0 or piece.state().progress <= before or piece.state().done:
            return
        retry = False
