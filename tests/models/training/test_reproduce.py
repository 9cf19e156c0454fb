"""The paper's table in pieces: what is finished is not run again, what is another run is refused."""

import json
import shutil

import pytest

from models import reproduce
from models.training import run
from tests.models.training.small import images

NETWORKS = ("cnn18", "rir18")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(reproduce, "load", lambda _: images())


def reproduced(out, *more):
    common = ["--data", "digits", "--width", "thin", "--seeds", "1", "--device", "cpu", "--networks", *NETWORKS]
    return reproduce.main([*common, "--epochs", "2", "--out", str(out), *more])


def test_in_pieces(tmp_path, monkeypatch, capsys):
    """A run that is missing is made up for, the others are not built again, and the table is of all of them."""
    assert reproduced(tmp_path) == 0
    whole = json.loads((tmp_path / "results.json").read_text())
    assert [row["network"] for row in whole["rows"]] == ["cnn18_thin", "rir18_thin"] and whole["missing_runs"] == 0
    shutil.rmtree(tmp_path / "rir18_thin-seed0")

    built, original = [], reproduce.Run
    monkeypatch.setattr(
        reproduce, "Run", lambda chosen, *a, **k: built.append(chosen.model) or original(chosen, *a, **k)
    )
    assert reproduced(tmp_path) == 0
    assert built == ["rir18_thin"]
    again = json.loads((tmp_path / "results.json").read_text())
    for ours, theirs in zip(again["rows"], whole["rows"], strict=True):
        assert ours["test_accuracy"] == theirs["test_accuracy"] and ours["epochs"] == 2


def test_no_time_left(tmp_path, capsys):
    assert reproduced(tmp_path, "--minutes", "0") == 0
    assert "no run" in capsys.readouterr().out and not (tmp_path / "results.json").exists()


def test_a_run_of_other_settings_is_refused(tmp_path, capsys):
    """The table compares networks that were trained alike; the run stays as it is."""
    assert reproduced(tmp_path, "--networks", "cnn18") == 0
    checkpoint = tmp_path / "cnn18_thin-seed0" / run.CHECKPOINT
    before = checkpoint.read_bytes()
    assert reproduced(tmp_path, "--epochs", "3") == 2
    said = capsys.readouterr()
    assert "started with epochs=2, not 3" in (said.out + said.err).replace("\n", " ")
    assert checkpoint.read_bytes() == before
