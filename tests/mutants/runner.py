"""Runs a selection of tests in a copy of the checkout, with a fault in one file or without."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .mutant import Mutant

LIMIT = 20.0  # seconds of a run
COPIED = ("rir_kernels", "tests", "models", "bench", "demo", "pyproject.toml")
PASSED, FAILED = 0, 1  # pytest's; every other status means that no test has judged


@dataclass(frozen=True)
class Outcome:
    status: int | None  # pytest's exit status, minus the signal that ended it; None: out of time
    seconds: float
    output: str

    @property
    def first_failure(self) -> str:
        """The test that failed, its folder left out, or what ended the run."""
        if self.status is None:
            return f"out of time ({LIMIT:.0f} s)"
        if self.status < 0:
            return f"signal {-self.status}"
        found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - |$)", self.output, re.MULTILINE)
        return found[1] if found else "a failure that pytest does not name"


def run_tests(root: Path, tests: tuple[str, ...], mutant: Mutant | None = None, limit: float | None = LIMIT) -> Outcome:
    """Of pytest in a copy of the checkout `root`, which has the mutant's fault."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder).resolve()
        for name in COPIED:
            source = root / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy / name)
        if mutant is not None:
            (copy / mutant.file).write_text(mutant.source(root))
            # compiled from the text as it was, which a clock too coarse would take for the new one
            Path(importlib.util.cache_from_source(str(copy / mutant.file))).unlink(missing_ok=True)
        return _pytest(copy, tests, limit)


def _pytest(folder, tests, limit):
    # on a GPU's machine too in the interpreter, by which the tests are chosen
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder), "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [*command, "-p", "tests.mutants.imported", *tests],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return Outcome(None, limit, str(error.output))
    return Outcome(done.returncode, time.monotonic() - begin, done.stdout)


def verdict(mutated: Outcome, baseline: Outcome) -> tuple[str, str]:
    """("killed", by what), ("SURVIVED", "") or ("error", why no test has judged)."""
    if mutated.status == PASSED:
        return "SURVIVED", ""
    if mutated.status is None and baseline.seconds > LIMIT / 2:
        return "error", f"out of time, as the tests without a fault almost are ({baseline.seconds:.0f} s)"
    if mutated.status is None or mutated.status == FAILED or mutated.status < 0:
        return "killed", mutated.first_failure
    return "error", f"pytest ended with status {mutated.status}: {mutated.output.strip().splitlines()[-1:]}"


def run_all(root: Path, mutants: list[Mutant], workers: int, report) -> int:
    """report(mutant or None, verdict, text, seconds) for the tests without a fault, then for each mutant.

    Returns how many were killed: none where a test fails without a fault.
    """
    with ThreadPoolExecutor(workers) as pool:
        if not _pass_without_a_fault(root, mutants, workers, pool, report):
            return 0

        def judge(mutant):
            outcome = run_tests(root, mutant.tests, mutant)
            # how long the tests take by themselves is asked only where that decides
            alone = run_tests(root, mutant.tests) if outcome.status is None else outcome
            return mutant, *verdict(outcome, alone), outcome.seconds

        killed = 0
        for mutant, *found in pool.map(judge, mutants):
            report(mutant, *found)
            killed += found[0] == "killed"
        return killed


def _pass_without_a_fault(root, mutants, workers, pool, report):
    """Every selection once, many to a run: most of a short one is imports."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    shares = [tuple(tests[worker::workers]) for worker in range(min(workers, len(tests)))]
    passed = True
    for outcome in pool.map(lambda share: run_tests(root, share, limit=None), shares):
        good = outcome.status == PASSED
        report(None, "passed" if good else "error", "" if good else outcome.first_failure, outcome.seconds)
        passed &= good
    return passed
