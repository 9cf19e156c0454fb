"""Committed results against the kernels as they are."""

import pytest

from bench import provenance
from bench.check import check
from tests.bench.helpers import results


@pytest.fixture(autouse=True)
def now(monkeypatch):
    monkeypatch.setattr(provenance, "sources_hash", lambda: "now")


def test_nothing_is_committed(tmp_path):
    assert check(tmp_path / "results") == []


def test_stale_and_current(tmp_path):
    results(sources_hash="now").save(tmp_path / "gpu" / "a.json")
    results(sources_hash="then").save(tmp_path / "gpu" / "b.json")
    current, stale = check(tmp_path)
    assert (current.path, current.stale, current.text) == (tmp_path / "gpu" / "a.json", False, "of the current kernels")
    assert stale.stale
    assert "kernels have changed" in stale.text


def test_what_cannot_be_read_is_stale(tmp_path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "a.json").write_text("{")
    (status,) = check(tmp_path)
    assert status.stale
    assert "cannot be read as JSON" in status.text


def test_a_dirty_tree_is_mentioned(tmp_path):
    results(sources_hash="now", git_dirty=True).save(tmp_path / "gpu" / "a.json")
    (status,) = check(tmp_path)
    assert not status.stale
    assert "not committed" in status.text
