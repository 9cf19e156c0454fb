"""Tuning: what it writes is what the launcher reads, and nothing wrong is ever chosen."""

import dataclasses
import json

import pytest
import torch

from bench import cli, timing, tune
from rir_kernels.triton import measured
from rir_kernels.triton.config import conv_config, ranked_tiles
from rir_kernels.triton.cost import H200, Gpu, Problem
from rir_kernels.triton.launch import conv
from rir_kernels.triton.shapes import Shape

SHAPE = Shape(8, 8, 4, batch=2)
PROBLEM = Problem(2, 4, 4, 8, 8, (3, 3), 4, (1, 1))
DEVICE = Gpu(name="Made-up GPU 9")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    yield tmp_path
    measured._load.cache_clear()


@pytest.fixture
def run(folder, monkeypatch):
    """run(milliseconds by candidate) tunes one shape, in the interpreter, by a clock that says so."""

    def run(*milliseconds):
        def clock(calls, device, settings):
            for call in calls.values():
                call()
            return {index: timing.Timing(samples=[milliseconds[index]]) for index in calls}

        monkeypatch.setattr(timing, "measure_steady", clock)
        monkeypatch.setattr(tune, "gpu_of", lambda device: DEVICE)
        settings = timing.Settings(rounds=1)
        path = tune.tune(
            [SHAPE], ["fp32"], torch.device("cpu"), folder, candidates=len(milliseconds), settings=settings
        )
        return json.loads(path.read_text()) if path.exists() else None

    return run


@pytest.mark.interpreter
def test_the_fastest_is_written_and_then_chosen(run, folder):
    ranked = tune._different(ranked_tiles(PROBLEM, DEVICE))
    assert len({ranked[i][1] for i in range(3)}) == 3
    data = run(3.0, 1.0, 2.0)
    assert [path.name for path in folder.iterdir()] == ["made-up-gpu-9.json"]
    (entry,) = data["tiles"]
    assert entry["ms"] == 3.0  # inference, training and data gradient, 1 ms each
    assert [found["ms"] for found in entry["measured"]] == [9.0, 3.0, 6.0]
    assert measured.measured_tile(PROBLEM, DEVICE) == ranked[1][1]
    assert conv_config(PROBLEM, True, DEVICE) == ranked[1][1]
    # another GPU, another problem: by rule
    assert measured.measured_tile(PROBLEM, H200) is None
    assert measured.measured_tile(dataclasses.replace(PROBLEM, n=3), DEVICE) is None


@pytest.mark.interpreter
def test_a_tile_that_computes_something_else_is_not_taken(run, monkeypatch):
    wrong = tune._different(ranked_tiles(PROBLEM, DEVICE))[1][1]
    right = conv.conv_config

    def fragile(*args, **options):
        tile = right(*args, **options)
        if tile == wrong:
            raise RuntimeError("out of resources")
        return tile

    monkeypatch.setattr(conv, "conv_config", fragile)
    (entry,) = run(3.0, 1.0, 2.0)["tiles"]
    assert [found["ms"] for found in entry["measured"]] == [9.0, None, 6.0]
    assert entry["ms"] == 6.0


def test_every_kind_is_tried():
    ranked = ranked_tiles(Problem(256, 7, 7, 512, 512, (3, 3), 2, (1, 1)))
    kinds = tune._different(ranked)
    assert kinds[0] == ranked[0]
    assert [clocks for clocks, _ in kinds] == sorted(clocks for clocks, _ in kinds)
    assert {(tile.rows, tile.skips) for _, tile in kinds[:20]} == {(1, False), (1, True), (2, False), (4, False)}
    thin = tune._different(ranked_tiles(Problem(256, 16, 16, 32, 32, (3, 3), 2, (1, 1))))
    assert {tile.fold for _, tile in thin[:5]} == {False, True}


def written(folder, **changes):
    tile = {"box": [2, 1, 4], "block_c": 64, "block_k": 16, "num_warps": 4, "num_stages": 3, "groups": 1, "rows": 2}
    problem = {"n": 2, "h": 4, "w": 4, "c": 8, "k": 8, "taps": [3, 3], "itemsize": 4, "padding": [1, 1]}
    entry = {"problem": problem, "tile": tile | changes}
    (folder / "made-up-gpu-9.json").write_text(json.dumps({"schema": 1, "tiles": [entry]}))


def test_a_file_is_read(folder):
    written(folder)
    assert measured.measured_tile(PROBLEM, DEVICE).rows == 2


def test_a_file_with_a_folded_tile_is_read(folder):
    written(folder, fold=True, rows=1, box=[2, 2, 4], block_c=16)
    assert measured.measured_tile(PROBLEM, DEVICE).fold


@pytest.mark.parametrize(
    "changes",
    [
        {"box": [2, 1, 3]}, {"box": [2, 4]}, {"box": [512, 1, 1]}, {"block_c": 32}, {"num_warps": 16}, {"groups": 0},
        {"rows": True + 8}, {"num_stages": "3"}, {"box": [2, 2, 4]}, {"num_stages": 8, "block_k": 256}, {"surprise": 1},
        {"box": [256, 1, 1], "rows": 4}, {"skips": True}, {"skips": 1, "box": [8, 1, 1]},
        {"fold": True}, {"fold": 1, "box": [2, 2, 4], "rows": 1}, {"fold": True, "box": [2, 2, 4]},
        {"fold": True, "box": [2, 2, 4], "rows": 1, "block_c": 8},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_tile_is_refused(folder, changes):
    written(folder, **changes)
    with pytest.warns(UserWarning, match="made-up-gpu-9.json is ignored, tiles are chosen by rule"):
        assert measured.measured_tile(PROBLEM, DEVICE) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "tiles": [1]}'])
def test_what_is_no_file_of_tiles_is_refused(folder, text):
    (folder / "made-up-gpu-9.json").write_text(text)
    with pytest.warns(UserWarning, match="is ignored"):
        assert measured.measured_tile(PROBLEM, DEVICE) is None


def test_shipped_files_are_valid():
    for path in measured.FOLDER.glob("*.json"):
        data = json.loads(path.read_text())
        gpu = Gpu(name=data["device"])
        assert path.name == f"{measured.slug(data['device'])}.json"
        assert len(measured._load(path, gpu)) == len(data["tiles"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune"])
    assert "tiles are measured on a CUDA device" in capsys.readouterr().err
