"""The results file: what is written is read, nothing else is, and its documentation is complete."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from bench.cases import kernels, layers, models
from bench.schema import IMPLS, MODES, SUITES, ResultsError, Row, load, load_all
from tests.bench.helpers import results, row
from tooling import provenance
from tooling.sources import sources_hash

README = (Path(__file__).parents[2] / "bench" / "README.md").read_text()


def test_what_is_written_is_read(tmp_path):
    written = results(
        [row(), row(impl="triton", error="gate: no", passed=False, ms_median=None)], absent={"cudnn": "x"}
    )
    path = written.save(tmp_path / "new" / "layers.json")
    assert load(path) == written
    assert [found.name for found in path.parent.iterdir()] == ["layers.json"]  # no draft is left
    assert load_all(path.parent) == load_all(path) == [written]


def test_numbers_that_json_does_not_have(tmp_path):
    written = results([row(tflops=math.inf, samples=[1.0, math.nan])])
    (found,) = load(written.save(tmp_path / "a.json")).rows
    assert found.tflops is None and found.samples == [1.0, None]


def changed(**changes):
    return json.dumps(dataclasses.asdict(results()) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected schema 1, got list"),
        ("{}", "expected schema 1, got None"),
        (changed(schema=2), "expected schema 1, got 2: measure again"),
        (changed(rows=[{"suite": "layers"}]), "not of schema 1"),
        (changed(surprise=1), "not of schema 1"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=message):
        load(path)


def test_no_files_at_all(tmp_path):
    with pytest.raises(ResultsError, match="run `python -m bench --out DIR` first"):
        load_all(tmp_path)
    with pytest.raises(ResultsError, match="cannot be read"):
        load(tmp_path / "none.json")


def test_every_field_and_name_is_documented():
    fields = [field.name for kind in (Row, type(results())) for field in dataclasses.fields(kind)]
    assert not [name for name in fields if f"`{name}`" not in README]
    ops = [*kernels.OPS, *layers.OPS, *models.OPS]
    assert not [name for name in (*SUITES, *IMPLS, *MODES, *ops) if f'"{name}"' not in README]


def test_results_of_another_kind_in_the_folder(tmp_path):
    (tmp_path / "memory.json").write_text('{"kind": "memory", "rows": []}')
    with pytest.raises(ResultsError, match="no results in"):
        load_all(tmp_path)
    with pytest.raises(ResultsError, match="expected a suite's times, got results of the kind 'memory'"):
        load_all(tmp_path / "memory.json")  # who names it means it
    written = results()
    written.save(tmp_path / "layers.json")
    assert load_all(tmp_path) == [written]


@pytest.mark.parametrize("kind", ["layers", "models"])
def test_the_hash_is_that_of_the_kind_and_device(kind):
    found = provenance.of_a_run(torch.device("cpu"), kind)
    assert found["sources_hash"] == sources_hash(kind, found["device"])


def test_the_state_of_the_checkout():
    commit, dirty = provenance.git_state()
    assert commit == "unknown" or (len(commit) == 40 and isinstance(dirty, bool))
    assert {"torch", "triton", "python"} <= provenance.versions().keys()
