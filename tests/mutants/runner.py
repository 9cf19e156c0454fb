"""Runs selections of tests in copies of the checkout, each with a fault in one file or without.

A run is a fork of this process, which has imported what takes long and is the same for all: nothing of the checkout
that a fault could be in, and not Triton, which must be told first whether to interpret kernels. Compiled kernels are
kept in Triton's cache, by their source. Limits are of processor time: on a busy machine the verdicts are the same.
"""

import importlib.util
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .mutant import Mutant

LIMIT = 20  # seconds of a run
EMULATED_LIMIT = 120  # likewise, where kernels are compiled, and emulated in two timings
ASLEEP = 30 * LIMIT  # until one that waits for something is ended
COPIED = ("rir_kernels", "emulator", "tests", "models", "bench", "demo", "tooling", "pyproject.toml")
PASSED, FAILED = 0, 1  # pytest's; every other status means that no test has judged
OUT_OF_TIME = -signal.SIGXCPU, -signal.SIGALRM


@dataclass(frozen=True)
class Run:
    """The tests, with the mutant's fault or without any; limit in seconds, None: as long as it takes."""

    tests: tuple[str, ...]
    mutant: Mutant | None = None
    limit: int | None = LIMIT
    emulated: bool = False


@dataclass(frozen=True)
class Outcome:
    status: int  # pytest's exit status, or minus the signal that ended it
    seconds: float
    output: str

    @property
    def first_failure(self) -> str:
        """The test that failed, its folder left out, or what ended the run."""
        if self.status in OUT_OF_TIME:
            return "out of time"
        if self.status < 0:
            return signal.Signals(-self.status).name
        found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - |$)", self.output, re.MULTILINE)
        return found[1] if found else " ".join(self.output.split()[-20:])


def outcomes(root: Path, runs: Iterable[Run], workers: int) -> Iterator[tuple[Run, Outcome]]:
    """Each run's, as they end; `workers` at a time."""
    for name in ("numpy", "pytest", "torch"):
        importlib.import_module(name)
    waiting, running = list(runs), {}
    while waiting or running:
        while waiting and len(running) < workers:
            run, folder = waiting.pop(0), tempfile.TemporaryDirectory(prefix="mutant-")
            running[_start(root, run, Path(folder.name).resolve())] = run, folder
        pid, status, usage = os.wait3(0)
        run, folder = running.pop(pid)
        output = Path(folder.name, "output").read_text(errors="replace")
        folder.cleanup()
        yield run, Outcome(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, output)


def _start(root, run, folder):
    """The process that runs it in a copy of the checkout."""
    for name in COPIED:
        (shutil.copytree if (root / name).is_dir() else shutil.copy2)(root / name, folder / name)
    if run.mutant is not None:
        faulty = folder / run.mutant.file
        faulty.write_text(run.mutant.source(root))
        # compiled from the text as it was, which a clock too coarse would take for the new one
        Path(importlib.util.cache_from_source(str(faulty))).unlink(missing_ok=True)
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 70  # none of pytest's
    try:
        status = int(_pytest(folder, run))
    finally:
        sys.stdout.flush()
        os._exit(status)


def _pytest(folder, run):
    """In a process of its own, which is the folder's from here on."""
    import pytest

    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    signal.alarm(ASLEEP)
    if run.limit is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (run.limit, run.limit + 5))
    os.chdir(folder)
    # the tests are chosen by what runs there, on a GPU's machine too
    interpret = "0" if run.emulated else "1"
    os.environ |= {"PYTHONPATH": str(folder), "COLUMNS": "200", "TRITON_INTERPRET": interpret}
    sys.path[:] = [str(folder), *(path for path in sys.path if path and not Path(path, "rir_kernels").is_dir())]
    for name in [name for name in sys.modules if name.split(".")[0] in COPIED]:
        del sys.modules[name]
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "tests.mutants.imported"]
    return pytest.main([*options, *["--emulated"] * run.emulated, *run.tests])


def verdict(mutated: Outcome, alone: Outcome | None = None, unseen: Outcome | None = None) -> tuple[str, str]:
    """("killed", by what), ("SURVIVED", "") or ("error", why no test has judged).

    alone: where the run was out of time, the same tests without the fault, in half of the time.
    unseen: of the tests that must not notice the fault, in the interpreter.
    """
    if mutated.status == PASSED:
        return "SURVIVED", ""
    if mutated.status in OUT_OF_TIME and (alone is None or alone.status != PASSED):
        return "error", "out of time, and without the fault the tests take more than half of it too"
    if mutated.status != FAILED and mutated.status >= 0:
        return "error", f"pytest ended with status {mutated.status}: {mutated.first_failure}"
    if unseen is None:
        return "killed", mutated.first_failure
    if unseen.status != PASSED:
        return "error", f"killed (emulated), but not unseen by the interpreter: {unseen.first_failure}"
    return "killed", f"{mutated.first_failure} (emulated), unseen by the interpreter"


def run_all(root: Path, mutants: list[Mutant], workers: int, report) -> int:
    """report(mutant or None, verdict, text, seconds) for the tests without a fault, then for each mutant.

    Returns how many were killed: none where a test fails without a fault.
    """
    passed = True
    for _, outcome in outcomes(root, _without_faults(mutants, workers), workers):
        good = outcome.status == PASSED
        report(None, "passed" if good else "error", "" if good else outcome.first_failure, outcome.seconds)
        passed &= good
    if not passed:
        return 0

    killed, late, met = 0, {}, {}
    for run, outcome in outcomes(root, [run for mutant in mutants for run in _runs(mutant)], workers):
        mutant = run.mutant
        met[mutant, run.emulated] = outcome
        if not all((mutant, other.emulated) in met for other in _runs(mutant)):
            continue
        if met[mutant, mutant.emulated].status in OUT_OF_TIME:
            late[mutant] = None
        else:
            killed += _reported(report, mutant, met)
    again = {run: outcome for run, outcome in outcomes(root, dict.fromkeys(map(_alone, late)), workers)}
    return killed + sum(_reported(report, mutant, met, again[_alone(mutant)]) for mutant in late)


def _without_faults(mutants, workers):
    """Every selection once, many to a run."""
    for emulated in (True, False):
        tests = {test for mutant in mutants for run in _runs(mutant) if run.emulated == emulated for test in run.tests}
        for worker in range(min(workers, len(tests))):
            yield Run(tuple(sorted(tests)[worker::workers]), limit=None, emulated=emulated)


def _runs(mutant):
    limit = EMULATED_LIMIT if mutant.emulated else LIMIT
    yield Run(mutant.tests, mutant, limit, mutant.emulated)
    if mutant.emulated:
        yield Run(mutant.unseen, mutant)


def _alone(mutant):
    """What judges the fault, without it and in half of the time."""
    run = next(_runs(mutant))
    return Run(run.tests, None, run.limit // 2, run.emulated)


def _reported(report, mutant, met, alone=None) -> bool:
    """Whether the mutant was killed."""
    mutated, unseen = met[mutant, mutant.emulated], met[mutant, False] if mutant.emulated else None
    word, text = verdict(mutated, alone, unseen)
    report(mutant, word, text, mutated.seconds + (unseen.seconds if unseen else 0.0))
    return word == "killed"
