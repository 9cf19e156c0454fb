"""Work in pieces: its order, what a crash and a hang cost, and that the next call goes on."""

import sys
import time
from dataclasses import dataclass, field

import pytest

from bench import pieces
from bench.gpu import DRY, SuitePiece
from bench.pieces import State, work
from tests.bench.helpers import results, row
from tooling.process import Ended, run_limited


def python(program, seconds=60.0, **options):
    lines = []
    return run_limited([sys.executable, "-c", program], seconds, echo=lines.append, **options), lines


def test_a_command_that_ends_by_itself():
    ended, lines = python("import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)")
    assert (ended.code, ended.why) == (3, "") and sorted(lines) == ["one", "two"]


def test_a_command_that_takes_too_long_is_killed_with_its_children():
    program = "import subprocess, sys, time; c = subprocess.Popen(['sleep', '600']); print(c.pid); time.sleep(600)"
    ended, (pid,) = python(program, seconds=3.0)
    assert ended.code is None and ended.why == "killed after 3 s, its limit"
    time.sleep(0.1)  # for the orphan's new parent to take notice
    try:
        with open(f"/proc/{pid}/stat") as stat:
            assert stat.read().split()[2] == "Z"
    except FileNotFoundError:
        pass


def test_a_command_that_falls_silent_is_killed():
    ended, lines = python("import time; print('begun'); time.sleep(600)", silent=2.0)
    assert ended.why == "killed after 2 s of silence" and lines == ["begun"] and ended.seconds < 30


@dataclass
class Made:
    """A piece that ends as `ways` says, one way for each start: "done", "crash" after a step forward, or "hang"."""

    name: str
    ways: list
    seconds: float = 60.0
    silent: float | None = None
    starts: int = 0
    notes: list = field(default_factory=list)
    last: str = ""

    def state(self):
        return State(self.starts > 0, self.last == "done", self.last in ("crash", "hang"), self.progress, self.last)

    @property
    def progress(self):
        return self.starts if self.last != "hang" else 0

    def command(self, seconds, retry):
        return [self, retry]

    def ended(self, how):
        self.notes.append(how.why or how.code)


@pytest.fixture
def started(monkeypatch):
    """What is started, in order: (piece, whether what failed is tried again)."""
    order = []

    def start(command, seconds, *, silent):
        piece, retry = command[3:]
        order.append((piece.name, retry))
        piece.last = piece.ways[min(piece.starts, len(piece.ways) - 1)]
        piece.starts += 1
        code = {"done": 0, "crash": 3, "hang": None}[piece.last]
        return Ended(code, 1.0, "killed" if code is None else "", ())

    monkeypatch.setattr(pieces, "run_limited", start)
    return order


def test_a_crash_is_continued_and_a_hang_is_left_for_later(started, capsys):
    parts = [Made("a", ["hang", "done"]), Made("b", ["crash", "done"]), Made("c", ["done"])]
    assert not work(parts, minutes=5)
    assert started == [("a", False), ("b", False), ("b", False), ("c", False)]
    assert parts[0].notes == ["killed"] and parts[1].notes == [3]
    assert "missing: a" in capsys.readouterr().out
    started.clear()
    assert work(parts, minutes=5)
    assert started == [("a", True)]  # what is done is not started again
    assert "nothing is missing" in capsys.readouterr().out


def test_without_time_nothing_is_started(started, capsys):
    assert work([Made("a", ["done"])], minutes=0.01)
    assert started == [] and "missing: a" in capsys.readouterr().out


def test_what_failed_comes_after_what_was_never_begun(started):
    parts = [Made("a", ["done"], starts=1, last="crash"), Made("b", ["done"])]
    work(parts, minutes=5)
    assert [name for name, _ in started] == ["b", "a"]


def test_the_state_of_a_suite(tmp_path, monkeypatch):
    piece = SuitePiece("layers", DRY["layers"], tmp_path)
    assert not piece.state().begun
    results([row()]).save(tmp_path / "layers.json")
    assert not piece.state().begun  # it is of other sources
    monkeypatch.setattr("bench.gpu.sources_now", lambda *_: results().sources_hash)
    results([row()], unreached=["rir_layer 64@8 x256 bf16"]).save(tmp_path / "layers.json")
    assert piece.state() == State(True, False, False, 1, "1 rows; 1 cases missing, such as rir_layer 64@8 x256 bf16")
    results([row()], begun="rir_layer 64@8 x256 bf16").save(tmp_path / "layers.json")
    assert not piece.state().done
    results([row()], lost=["rir_layer 64@8 x256 bf16"]).save(tmp_path / "layers.json")
    assert piece.state().done and piece.state().failed
    results([row(impl="triton", error="gate: wrong", ms_median=None)]).save(tmp_path / "layers.json")
    assert piece.state().failed and "gate: wrong" in piece.state().text
