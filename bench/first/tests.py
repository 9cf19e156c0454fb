"""The GPU's tests on all cores, folder by folder, those of the kernels first."""

import os
import re
import sys
import time

from tooling.process import run_limited

FOLDERS = ("tests/kernels", "tests/pytorch", "tests/models/training", "tests/bench", "tests/fuzz", "tests")
DRY = ("tests/repository/test_markers.py",)
RESERVE = 10.0  # seconds: what is left when the tests are ended, for the file to be written


def run(journal, machine, seconds):
    end = time.monotonic() + seconds - RESERVE
    for folder in DRY if machine.dry else FOLDERS:
        journal.take(folder, lambda folder=folder: _test(folder, end - time.monotonic(), machine))


def _test(folder, seconds, machine):
    select = [] if machine.dry else ["-m", "gpu", "-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *select, folder]
    if folder == "tests":
        command += [f"--ignore={other}" for other in FOLDERS[:-1]]
    passed, failed, lines = 0, [], []

    def heard(line):
        nonlocal passed
        lines.append(line)
        if found := re.search(r"(PASSED|FAILED|ERROR)\s+(tests/\S+)|(tests/\S+.*?) (PASSED|FAILED|ERROR)", line):
            outcome, name = (found[1], found[2]) if found[1] else (found[4], found[3])
            passed += outcome == "PASSED"
            if outcome != "PASSED" and name not in failed:
                failed.append(name)
                print(f"{outcome} {name}", flush=True)

    ended = run_limited(command, max(seconds, 1.0), echo=heard)
    found = {"passed": passed, "failed": failed}
    if failed:
        start = next((index for index, line in enumerate(lines) if "= FAILURES =" in line), len(lines))
        return found | {
            "status": "failed",
            "error": f"{len(failed)} failed, {passed} passed",
            "log": lines[start:][:400],
        }
    if ended.code not in (0, 5):  # 5: there are no such tests here
        why = ended.why or f"pytest's exit status {ended.code}"
        return found | {"status": "failed", "error": f"{why}; {passed} passed, none failed", "log": lines[-40:]}
    return found
