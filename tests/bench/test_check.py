"""Committed results against the code as it is, whatever kind of file they are in."""

import json

import pytest

from bench import cli
from bench.report import check as checking
from bench.report.check import check
from tests.bench.helpers import CPU, results, row
from tooling.sources import KINDS

GPU = {"name": "Made-up GPU", "type": "cuda"}


@pytest.fixture(autouse=True)
def now(monkeypatch):
    monkeypatch.setattr(checking, "sources_hash", lambda kind, device: f"{kind} of {device['type']}")


def written(tmp_path, data, name="a.json"):
    """The status of one file."""
    path = tmp_path / "gpu" / name
    path.parent.mkdir(parents=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    (status,) = check(tmp_path)
    assert status.path == path
    return status


def test_nothing_is_committed(tmp_path):
    assert check(tmp_path / "results") == []


def test_current_and_stale_results_of_the_benchmark(tmp_path):
    of_kernels = [row(suite="kernels", op="apply")]
    results(of_kernels, sources_hash="kernels of cuda").save(tmp_path / "gpu" / "a.json")
    results([row()], sources_hash="layers of cpu", device=CPU).save(tmp_path / "gpu" / "below" / "b.json")
    results([row()], sources_hash="kernels of cuda").save(tmp_path / "gpu" / "c.json")
    # of several suites: the one that depends on most
    results([*of_kernels, row(suite="models")], sources_hash="models of cuda").save(tmp_path / "gpu" / "d.json")
    results(sources_hash="models of cuda").save(tmp_path / "gpu" / "e.json")
    (tmp_path / "gpu" / "report.md").write_text("no data")
    a, b, c, d, e = sorted(check(tmp_path), key=lambda status: status.path.name)
    assert (a.path, a.text, a.failed) == (tmp_path / "gpu" / "a.json", "kernels: current", False)
    assert (b.text, b.failed) == ("layers: current", False)
    assert (c.text, c.failed) == (
        "layers: stale: the code it depends on has changed since; measure again", True,
    )  # fmt: skip
    assert d.text == e.text == "models: current"


@pytest.mark.parametrize("kind", ["training", "ablation", "first", "memory"])
def test_other_kinds(tmp_path, kind):
    current = {"kind": kind, "device": GPU, "sources_hash": f"{kind} of cuda"}
    assert written(tmp_path / "1", current)[1:] == (f"{kind}: current", False)
    stale = written(tmp_path / "2", current | {"device": CPU})
    assert stale.failed and stale.text.startswith(f"{kind}: stale")


def test_nothing_to_compare(tmp_path):
    assert written(tmp_path / "1", {"kind": "ablation"})[1:] == ("ablation: not checked: it names no sources", False)
    assert written(tmp_path / "2", {"kind": "hessian"})[1:] == ("hessian: depends on no code of rir_kernels", False)
    log = '{"epoch": 1}\n{"epoch": 2}\n'
    assert not written(tmp_path / "3", log, "metrics.jsonl").failed


@pytest.mark.parametrize(
    ("data", "name", "text"),
    [
        ("{", "a.json", "cannot be read as JSON"),
        ({"schema": 2}, "a.json", "expected schema 1, got 2"),
        ({"rows": []}, "a.json", "unknown: expected an object with a `kind`"),
        ([1], "a.json", "unknown: expected an object"),
        (
            {"kind": "poem"},
            "a.json",
            "unknown kind 'poem', expected one of ablation, first, hessian, machine, matrix, memory, simulated, "
            "training",
        ),
        ('{"epoch": 1}\n{', "a.jsonl", "cannot be read as JSON lines"),
        ('{"step": 1}\n', "a.jsonl", "unknown: expected a training run's log"),
    ],
)
def test_what_is_unknown_or_unreadable_fails(tmp_path, data, name, text):
    status = written(tmp_path, data, name)
    assert status.failed
    assert text in status.text


def test_a_device_of_no_known_type_fails(tmp_path, monkeypatch):
    monkeypatch.undo()
    status = written(tmp_path, {"kind": "first", "device": "H200", "sources_hash": "0"})
    assert status.failed and "expected a device with a type" in status.text


def test_a_dirty_tree_is_mentioned(tmp_path):
    results([row()], sources_hash="layers of cuda", git_dirty=True).save(tmp_path / "gpu" / "a.json")
    (status,) = check(tmp_path)
    assert not status.failed
    assert "not committed" in status.text


def test_the_committed_files_are_of_known_kinds(monkeypatch, capsys):
    monkeypatch.undo()
    assert {"kernels", "layers", "models"} <= KINDS.keys()
    found = check()
    assert found and not [status for status in found if "unknown" in status.text or "cannot be read" in status.text]
    assert cli.main(["check"]) == any(status.failed for status in found)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [status.text for status in found]
    assert lines[0].startswith("bench/results/")
