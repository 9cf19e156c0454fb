"""The table of deliberate faults is sound: each changes one place of the source, and names tests that are there."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.mutant import Mutant, problems
from tests.mutants.runner import LIMIT, OUT_OF_TIME, Outcome, verdict
from tests.mutants.table import MUTANTS

ROOT = Path(__file__).parents[2]
SOUND = Mutant(
    "one",
    "rir_kernels/autograd/backward_fusion.py",
    "consumers: int = 0",
    "consumers: int = 1",
    ("tests/repository/test_mutants.py::test_table",),
)


def test_table():
    assert len(MUTANTS) >= 36 and sum(mutant.emulated for mutant in MUTANTS) >= 15
    assert problems(MUTANTS, ROOT) == []


def _problem(**changes):
    (text,) = problems([dataclasses.replace(SOUND, **changes)], ROOT)
    return text


def test_what_is_wrong_with_a_table():
    assert problems([SOUND], ROOT) == []
    assert problems([SOUND, SOUND], ROOT) == ["one: two mutants of that name"]
    assert "changes no source" in _problem(new=SOUND.old)
    assert "is in rir_kernels/autograd/backward_fusion.py 0 times, expected once" in _problem(old="no such text")
    assert "times, expected once" in _problem(old="the")
    assert "invalid syntax" in _problem(new="consumers: int = =")
    assert _problem(file="rir_kernels/none.py").startswith("one: ")
    assert _problem(tests=("tests/none.py",)) == "one: no file tests/none.py"
    assert _problem(unseen=("tests/none.py",)) == "one: no file tests/none.py"
    assert (
        _problem(tests=("tests/repository/test_mutants.py::test_none[x::y]",))
        == "one: no test_none in tests/repository/test_mutants.py"
    )


def test_what_counts_as_killed():
    passed = Outcome(0, 1.0, "")
    failed = Outcome(1, 1.0, "...\nFAILED tests/kernels/test_x.py::test_y[a b] - assert 1 == 2\n")
    assert verdict(failed) == ("killed", "kernels/test_x.py::test_y[a b]")
    assert verdict(passed) == ("SURVIVED", "")
    assert verdict(Outcome(-signal.SIGSEGV, 1.0, "")) == ("killed", "SIGSEGV")
    for out_of_time in OUT_OF_TIME:
        late = Outcome(out_of_time, LIMIT, "")
        assert verdict(late, passed) == ("killed", "out of time")
        assert verdict(late, late)[0] == "error"
    assert verdict(failed, unseen=passed) == (
        "killed",
        "kernels/test_x.py::test_y[a b] (emulated), unseen by the interpreter",
    )
    assert verdict(passed, unseen=passed) == ("SURVIVED", "")
    for seen in (failed, Outcome(5, 1.0, "")):
        assert verdict(failed, unseen=seen)[0] == "error"
    for status in (2, 3, 4, 5):  # interrupted, internal error, usage, nothing collected: no test has judged
        assert verdict(Outcome(status, 1.0, "why"))[0] == "error"


@pytest.mark.long
def test_a_run_sees_the_fault_and_a_run_without_it_does_not():
    """One fault of each kind, in a new process, as the command has it: nothing of the checkout imported."""
    names = ["joined streams: gradients swapped", "compiled: the default stream"]
    command = [sys.executable, "-m", "tests.mutants", "--only", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "killed 2 of 2"
    assert done.stdout.count("(emulated), unseen by the interpreter") == 1
