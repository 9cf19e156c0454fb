"""The README's block: what it says with results and without, and that the real one is up to date."""

import math
from pathlib import Path

import pytest

from bench.report import check, headline
from tests.bench.helpers import CPU, results, row

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def now(request, monkeypatch):
    if "committed" not in request.node.name:
        monkeypatch.setattr(check, "sources_hash", lambda kind, device: f"now {kind} {device['name']}")


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{headline.BEGIN}\nold\n{headline.END}\n\nafter\n")
    return path


def pair(ours, theirs, **same):
    return [row(impl="auto", ms_median=ours, **same), row(impl="merged", ms_median=theirs, **same)]


def saved(tmp_path, rows=None, device="gpu", **changes):
    """The folder of results, with these rows in it."""
    rows = [*pair(0.1, 0.3), *pair(0.2, 0.25, shape="64@8")] if rows is None else rows
    results(rows, **{"sources_hash": "now layers Made-up GPU", **changes}).save(
        tmp_path / "bench" / "results" / device / "layers.json"
    )
    return tmp_path / "bench" / "results"


def test_readme_agrees_with_the_committed_results():
    assert headline.current(ROOT / "README.md", ROOT / "bench" / "results"), "run `python -m bench headline`"


def test_nothing_was_measured(tmp_path):
    assert headline.block(tmp_path / "results", tmp_path) == headline.NOTHING


def test_only_auto_makes_headlines(tmp_path):
    rows = [row(impl="triton", ms_median=0.1), row(impl="merged", ms_median=0.3)]
    assert "Among them is no rir_layer" in headline.block(saved(tmp_path, rows), tmp_path)


def test_a_cpu_does_not_count(tmp_path):
    results(pair(0.1, 0.3), device=CPU).save(tmp_path / "results" / "cpu" / "layers.json")
    assert headline.block(tmp_path / "results", tmp_path) == headline.NOTHING


def test_means_and_rows(tmp_path):
    text = headline.block(saved(tmp_path), tmp_path)
    assert f"| step | {math.sqrt(3 * 1.25):.2f} of 2 |" in text
    assert "| 96@32 | step | 3.00 |" in text
    assert "| 64@8 | step | 1.25 |" in text
    assert "Made-up GPU, 2020-01-02, torch 9.8" in text
    assert "(bench/results/gpu/speedup.png)" in text
    assert "earlier code" not in text


def test_only_what_the_headline_is_of(tmp_path):
    others = [{"dtype": "fp16"}, {"batch": 1}, {"op": "basic_block"}, {"graph": False}, {"l2": "cold"}]
    folder = saved(tmp_path, [found for same in others for found in pair(0.1, 0.3, **same)])
    assert "no rir_layer in bf16 with 256 images" in headline.block(folder, tmp_path)


def test_a_failed_gate_claims_nothing(tmp_path):
    failed = [row(impl="auto", passed=False), row(impl="triton"), row(impl="merged", ms_median=0.3)]
    text = headline.block(saved(tmp_path, [*failed, *pair(0.2, 0.25, shape="64@8")]), tmp_path)
    assert "| step | 1.25 of 1 |" in text
    assert "| 96@32 | step | failed |" in text
    assert "Among them is no" in headline.block(saved(tmp_path, failed), tmp_path)


def test_earlier_code_is_said(tmp_path):
    assert "Measured with earlier code" in headline.block(saved(tmp_path, sources_hash="then"), tmp_path)


def test_the_device_that_was_measured_last(tmp_path):
    saved(tmp_path, device="newer", created="2021-01-01T00:00:00Z")
    assert "results/newer/" in headline.block(saved(tmp_path, device="zz"), tmp_path)


def test_update_rewrites_the_block_alone(tmp_path, readme):
    folder = saved(tmp_path)
    assert not headline.current(readme, folder)
    assert headline.update(readme, folder)
    assert headline.current(readme, folder)
    assert not headline.update(readme, folder)
    text = readme.read_text()
    assert text.startswith(f"before\n\n{headline.BEGIN}\nMeasured on")
    assert text.endswith(f"</details>\n{headline.END}\n\nafter\n")
    assert (folder / "gpu" / "speedup.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", headline.BEGIN, f"{headline.END}\n{headline.BEGIN}\n"])
def test_markers_that_are_missing(tmp_path, readme, text):
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: expected <!-- bench:begin -->"):
        headline.update(readme, tmp_path)
    assert readme.read_text() == text
