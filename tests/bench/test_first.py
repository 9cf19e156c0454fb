"""The first minutes on a GPU, on a stand-in for one: every step runs, names its faults, and is not run again."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cli
from bench.first import STEPS
from bench.first.journal import LOST, Journal
from bench.first.machine import Machine
from bench.first.steps import StepPiece, file_of
from bench.measure.timing import DeviceLost
from rir_kernels.triton.shapes import SHAPE_TABLE
from tests.bench.helpers import results
from tests.mutants.table import MUTANTS
from tooling.process import Ended

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def bench(*arguments, root=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)], cwd=root, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """(the folder that all steps have left, what was printed)"""
    out = tmp_path_factory.mktemp("first")
    done = bench("first", "--dry", "--out", out, "--minutes", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_every_step_runs_on_the_stand_in(everything):
    out, printed = everything
    for name in STEPS:
        data = json.loads(file_of(out, name).read_text())
        assert data["status"] == "done" and data["begun"] is None, (name, data["error"])
        assert data["items"] and all(item["status"] == "done" for item in data["items"].values())
        assert data["dry"] and data["device"]["name"] == "stand-in (no GPU)"
    assert "nothing is missing" in printed


def test_it_ends_with_the_figure_that_a_user_looks_for(everything):
    out, printed = everything
    table = (out / "first.md").read_text()
    assert table in printed + "\n"
    for form in ("eager", "torch.compile", "fused (judged right)"):
        assert re.search(rf"^\| tiny x2 \| {re.escape(form)} \| \d+\.\d\d \| \d+ \|", table, re.MULTILINE), table
    assert "no figure here means anything" in table


def test_each_field_is_documented(everything):
    out, _ = everything
    documented = (ROOT / "bench" / "README.md").read_text()
    for name in STEPS:
        for field in json.loads(file_of(out, name).read_text()):
            assert f"`{field}`" in documented, field


def test_a_later_call_skips_what_is_done(everything):
    out, _ = everything
    before = {path: path.read_text() for path in out.glob("*.json")}
    done = bench("first", "--dry", "--out", out, "--minutes", "1")
    assert done.returncode == 0 and "==" not in done.stdout  # no step was started
    assert {path: path.read_text() for path in out.glob("*.json")} == before


def test_a_kernel_that_is_broken_on_purpose_is_named(tmp_path):
    """One fault in the sums that the data gradient takes for the layer upstream: of that kernel, and of no other."""
    for name in ("rir_kernels", "bench", "models", "tooling"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == "upstream: mean not taken out")
    (tmp_path / mutant.file).write_text(mutant.source(ROOT))
    # the smallest shape shows it
    program = "from bench import cli; from bench.first import exactness as e; e.SHAPES = e.SHAPES[:1]; cli.main({})"
    arguments = ["first", "--step", "exactness", "--dry", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", program.format(arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    items = json.loads(file_of(tmp_path / "out", "exactness").read_text())["items"]
    wrong = {name for name, item in items.items() if item["status"] != "done"}
    assert len(items) == 5 and wrong == {"64@8 x256 data gradient, sums"}, done.stderr
    assert "failed 64@8 x256 data gradient, sums: not exact: sum dy * xhat" in done.stdout


def test_results_of_a_gpu_are_not_replaced(tmp_path, capsys):
    made_up = results().save(tmp_path / "layers.json")
    before = made_up.read_text()
    for command in (["first"], ["gpu"], ["layers", "--shapes", "64@8"]):
        with pytest.raises(SystemExit):
            cli.main([*command, "--dry", "--out", str(tmp_path)])
        assert "was measured on Made-up GPU" in capsys.readouterr().err
    assert made_up.read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_a_step_of_other_kernels_is_begun_again(everything, monkeypatch):
    out, _ = everything
    assert StepPiece("exactness", out, dry=True).state().done
    monkeypatch.setattr("bench.first.steps.sources_now", lambda *_: "other sources")
    assert not StepPiece("exactness", out, dry=True).state().begun


# the file of a step


def journal(path, earlier=None, **options):
    return Journal(path, {"step": "x"}, CPU, earlier=earlier, **options)


def test_an_item_is_on_disk_before_the_next_one_begins(tmp_path):
    path = tmp_path / "x.json"
    book = journal(path)
    book.take("a", lambda: {"figure": 1})
    seen = []
    book.take("b", lambda: seen.append(json.loads(path.read_text())) or {})
    assert seen[0]["begun"] == "b" and seen[0]["items"]["a"]["figure"] == 1 and "b" not in seen[0]["items"]


def test_the_item_at_which_a_process_ended_is_lost_and_not_begun_again(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt):
        journal(path).take("a", interrupted)
    book = journal(path, json.loads(path.read_text()))
    assert book.items["a"]["status"] == "lost"
    book.take("a", lambda: pytest.fail("it was begun again"))
    assert not book.finish() and json.loads(path.read_text())["status"] == "failed"


def interrupted():
    raise KeyboardInterrupt


def test_a_failed_item_is_tried_again_only_when_asked(tmp_path):
    path = tmp_path / "x.json"
    book = journal(path)
    book.take("good", lambda: {"figure": 1})
    book.take("bad", lambda: 1 / 0)
    book.take("wrong", lambda: {"status": "failed", "error": "not exact"})
    assert not book.finish()
    data = json.loads(path.read_text())
    assert data["items"]["bad"]["error"] == "ZeroDivisionError: division by zero"
    assert set(journal(path, data).items) == {"good", "bad", "wrong"}
    again = journal(path, data, retry=True)
    assert set(again.items) == {"good"}
    again.take("bad", dict)
    again.take("wrong", dict)
    assert again.finish()


def test_a_lost_device_ends_the_process(tmp_path, monkeypatch):
    def lost(device, error):
        raise DeviceLost("an illegal memory access was encountered")

    monkeypatch.setattr("bench.measure.timing.check_device", lost)
    book = journal(tmp_path / "x.json")
    with pytest.raises(SystemExit) as ended:
        book.take("a", lambda: 1 / 0)
    assert ended.value.code == LOST and book.items["a"]["status"] == "lost"


def test_a_killed_step_says_where_it_was(tmp_path):
    piece = StepPiece("exactness", tmp_path)
    path = file_of(tmp_path, "exactness")
    with pytest.raises(KeyboardInterrupt):
        journal(path).take("96@32 forward", interrupted)
    piece.ended(Ended(None, 9.0, "killed after 9 s, its limit", ("last words",)))
    state = piece.state()
    assert state.failed and not state.done
    assert "killed after 9 s, its limit, at 96@32 forward" in state.text
    assert json.loads(path.read_text())["log"] == ["last words"]


def test_a_step_that_crashes_at_its_import_is_not_forgotten(tmp_path):
    piece = StepPiece("layer", tmp_path)
    piece.ended(Ended(1, 2.0, "", ("ImportError: no module",)))
    assert piece.state().failed and "exit status 1" in piece.state().text


# what is compiled ahead


def test_sizes_of_the_stand_in_keep_what_sets_shapes_apart():
    machine = Machine(dry=True)
    for shape in SHAPE_TABLE:
        small = machine.sized(shape)
        assert (small.c_in == small.c_out, small.size % 2) == (shape.c_in == shape.c_out, shape.size % 2)
        assert small.c_in * small.size**2 <= 16 * 25
    assert Machine().sized(SHAPE_TABLE[0]) == SHAPE_TABLE[0]
