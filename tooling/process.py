"""Runs a command, and kills it with all of its children if it takes too long or falls silent."""

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

KEPT = 40  # lines
GRACE = 30.0  # seconds between a process's last output and its end


@dataclass(frozen=True)
class Ended:
    code: int | None  # None where it was killed
    seconds: float
    why: str  # it was killed, or an empty string
    lines: tuple[str, ...]  # the last ones it printed


def run_limited(
    command: Sequence[str],
    seconds: float,
    *,
    silent: float | None = None,
    echo: Callable[[str], object] = print,
    environment: Mapping[str, str] = os.environ,
) -> Ended:
    """Runs the command and passes on what it prints, line by line.

    seconds: how long it may take. silent: how long it may print nothing. A process that waits for a GPU for ever cannot
    be interrupted, so both end in SIGKILL, for its whole process group.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        text=True, errors="replace", env={**environment, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
    )  # fmt: skip
    printed = deque(maxlen=KEPT)
    try:
        why = _watch(process, seconds, silent, lambda line: (printed.append(line), echo(line)))
    except BaseException:
        _end(process, 0)
        raise
    _end(process, 0 if why else GRACE)
    return Ended(None if why else process.returncode, time.monotonic() - started, why, tuple(printed))


def _watch(process, seconds, silent, heard) -> str:
    """Hands on the lines until there are no more; why it stopped listening before that."""
    lines = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        try:
            line = lines.get(timeout=max(0.0, left if silent is None else min(left, silent)))
        except queue.Empty:
            if time.monotonic() >= end:
                return f"killed after {seconds:.0f} s, its limit"
            return f"killed after {silent:.0f} s of silence"
        if line is None:
            return ""
        heard(line)


def _read(stream, lines):
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _end(process, grace):
    """Kills what is left of the process and what it started, after `grace` seconds in which it may end by itself."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
