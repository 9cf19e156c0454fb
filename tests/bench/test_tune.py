"""Tuning: what it writes is what the launcher reads, and nothing wrong is ever chosen."""

import dataclasses
import json

import pytest
import torch

from bench import cli
from bench.measure import timing, tune
from rir_kernels.triton.launch import conv, wgrad
from rir_kernels.triton.shapes import Shape
from rir_kernels.triton.tiling import measured
from rir_kernels.triton.tiling.conv_cost import Problem
from rir_kernels.triton.tiling.conv_tiles import conv_config, ranked_tiles
from rir_kernels.triton.tiling.gpus import H200, Gpu
from rir_kernels.triton.tiling.wgrad_cost import WgradProblem
from rir_kernels.triton.tiling.wgrad_tiles import wgrad_tile

SHAPE = Shape(8, 8, 4, batch=2)
PROBLEM = Problem(2, 4, 4, 8, 8, (3, 3), 4, (1, 1))
WGRAD_PROBLEM = WgradProblem(2, 4, 4, 8, 8, (3, 3), 1, 2, True, shares_rows=True, has_border=True, packs=True)
DEVICE = Gpu(name="Made-up GPU 9")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    yield tmp_path
    measured._load.cache_clear()


@pytest.fixture
def run(folder, monkeypatch):
    """run(kernel, dtype, milliseconds by candidate) tunes one shape, in the interpreter, by a clock that says so."""

    def run(kernel, dtype, *milliseconds):
        def clock(calls, device, settings):
            for call in calls.values():
                call()
            return {index: timing.Timing(samples=[milliseconds[index]]) for index in calls}

        monkeypatch.setattr(timing, "measure_steady", clock)
        monkeypatch.setattr(tune, "gpu_of", lambda device: DEVICE)
        monkeypatch.setattr(tune, "KERNELS", (kernel,))
        settings = timing.Settings(rounds=1)
        path = tune.tune([SHAPE], [dtype], torch.device("cpu"), folder, candidates=len(milliseconds), settings=settings)
        return json.loads(path.read_text()) if path.exists() else None

    return run


@pytest.mark.interpreter
def test_the_fastest_is_written_and_then_chosen(run, folder):
    ranked = tune.different(tune.CONVOLUTION, PROBLEM, DEVICE)
    assert len({ranked[i][1] for i in range(3)}) == 3
    data = run(tune.CONVOLUTION, "fp32", 3.0, 1.0, 2.0)
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
def test_the_weight_gradients_fastest_is_written_and_then_chosen(run):
    ranked = tune.different(tune.WEIGHT_GRADIENT, WGRAD_PROBLEM, DEVICE)
    (entry,) = run(tune.WEIGHT_GRADIENT, "fp16", 3.0, 2.0, 1.0)["wgrad_tiles"]
    assert [found["ms"] for found in entry["measured"]] == [3.0, 2.0, 1.0]
    assert measured.measured_wgrad_tile(WGRAD_PROBLEM, DEVICE) == ranked[2][1] != ranked[0][1]
    assert wgrad_tile(WGRAD_PROBLEM, DEVICE) == ranked[2][1]
    assert measured.measured_wgrad_tile(WGRAD_PROBLEM, H200) is None
    assert measured.measured_wgrad_tile(dataclasses.replace(WGRAD_PROBLEM, h=5), DEVICE) is None


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "kernel, dtype, module, chooses, ops",
    [
        (tune.CONVOLUTION, "fp32", conv, "conv_config", 3),
        (tune.WEIGHT_GRADIENT, "fp16", wgrad, "wgrad_tile", 1),
    ],
    ids=["convolution", "weight gradient"],
)
def test_a_tile_that_does_not_work_is_not_taken(run, monkeypatch, kernel, dtype, module, chooses, ops):
    problem = kernel.problem(SHAPE, getattr(torch, tune.DTYPES[dtype]), torch.device("cpu"))
    wrong = tune.different(kernel, problem, DEVICE)[1][1]
    right = getattr(module, chooses)

    def fragile(*args, **options):
        tile = right(*args, **options)
        if tile == wrong:
            raise RuntimeError("out of resources")
        return tile

    monkeypatch.setattr(module, chooses, fragile)
    (entry,) = run(kernel, dtype, 3.0, 1.0, 2.0)[kernel.field]
    assert [found["ms"] for found in entry["measured"]] == [3.0 * ops, None, 2.0 * ops]
    assert entry["ms"] == 2.0 * ops


@pytest.mark.interpreter
def test_both_kernels_are_tuned_in_one_file(folder, monkeypatch):
    monkeypatch.setattr(
        timing, "measure_steady", lambda calls, *_: {index: timing.Timing(samples=[1.0]) for index in calls}
    )
    shapes = [SHAPE, Shape(8, 16, 5, 1, 2, batch=2)]
    path = tune.tune(shapes, ["fp16"], torch.device("cpu"), folder, candidates=1, settings=timing.Settings(rounds=1))
    data = json.loads(path.read_text())
    gpu = Gpu(name=data["device"])
    for field, parse in (("tiles", measured._entry), ("wgrad_tiles", measured._wgrad_entry)):
        assert len(measured._load(path, field, parse, gpu)) == len(data[field]) == 2


def test_every_kind_is_tried():
    problem = Problem(256, 7, 7, 512, 512, (3, 3), 2, (1, 1))
    ranked = ranked_tiles(problem)
    kinds = tune.different(tune.CONVOLUTION, problem, H200)
    assert kinds[0] == ranked[0]
    assert [clocks for clocks, _ in kinds] == sorted(clocks for clocks, _ in kinds)
    assert {(tile.rows, tile.skips) for _, tile in kinds[:20]} == {(1, False), (1, True), (2, False), (4, False)}
    thin = tune.different(tune.CONVOLUTION, Problem(256, 16, 16, 32, 32, (3, 3), 2, (1, 1)), H200)
    assert {tile.fold for _, tile in thin[:5]} == {False, True}
    wgrad = tune.different(tune.WEIGHT_GRADIENT, dataclasses.replace(WGRAD_PROBLEM, n=256, h=32, w=32), H200)
    assert {(tile.walk, tile.rows) for _, tile in wgrad[:12]} >= {("images", 2), ("images", 4), ("rows", 1)}


def written(folder, **changes):
    tile = {"box": [2, 1, 4], "block_c": 64, "block_k": 16, "num_warps": 4, "num_stages": 3, "groups": 1, "rows": 2}
    problem = {"n": 2, "h": 4, "w": 4, "c": 8, "k": 8, "taps": [3, 3], "itemsize": 4, "padding": [1, 1]}
    entry = {"problem": problem, "tile": tile | changes}
    (folder / "made-up-gpu-9.json").write_text(json.dumps({"schema": 1, "tiles": [entry]}))


def wgrad_written(folder, problem=WGRAD_PROBLEM, **changes):
    tile = {"walk": "images", "box": [16, 1, 1], "rows": 2, "block_co": 64, "block_ci": 16,
            "num_warps": 4, "num_stages": 3, "pack": 1, "skips": True}  # fmt: skip
    entry = {"problem": dataclasses.asdict(problem), "tile": tile | changes}
    (folder / "made-up-gpu-9.json").write_text(json.dumps({"schema": 1, "wgrad_tiles": [entry]}))


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


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"skips": False}, {"walk": "row", "box": [1, 1, 16], "skips": False}, {"pack": 2},
        {"walk": "rows", "box": [1, 4, 4], "rows": 1, "skips": False},
    ],
    ids=str,
)  # fmt: skip
def test_a_tile_of_the_weight_gradient_is_read(folder, changes):
    wgrad_written(folder, **changes)
    tile = measured.measured_wgrad_tile(WGRAD_PROBLEM, DEVICE)
    assert {name: getattr(tile, name) for name in changes} == {
        name: tuple(value) if name == "box" else value for name, value in changes.items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"walk": "columns"}, {"walk": 1}, {"box": [16, 1]}, {"box": [8, 2, 1]}, {"box": [512, 1, 1]}, {"box": 16},
        {"box": [8, 1, 1]}, {"walk": "row"}, {"walk": "rows", "box": [1, 4, 4], "skips": False}, {"rows": 0},
        {"rows": 9}, {"steps": 0}, {"steps": 2.5}, {"steps": 1000}, {"block_co": 48}, {"block_ci": 8}, {"pack": 3},
        {"pack": 8}, {"pack": 4}, {"skips": 1}, {"num_warps": 2}, {"num_stages": 0}, {"block_co": 256, "block_ci": 256},
        {"num_stages": 8, "block_co": 128, "block_ci": 256, "num_warps": 8, "box": [256, 1, 1]}, {"surprise": 1},
        {"walk": "row", "box": [1, 1, 16]}, {"walk": "rows", "box": [4, 2, 2], "rows": 1, "skips": False},
        {"problem": dataclasses.replace(WGRAD_PROBLEM, shares_rows=False)},
        {"problem": dataclasses.replace(WGRAD_PROBLEM, has_border=False)},
        {"problem": dataclasses.replace(WGRAD_PROBLEM, packs=False), "pack": 2},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_tile_of_the_weight_gradient_is_refused(folder, changes):
    wgrad_written(folder, **changes)
    with pytest.warns(UserWarning, match="made-up-gpu-9.json is ignored, tiles are chosen by rule"):
        assert measured.measured_wgrad_tile(changes.get("problem", WGRAD_PROBLEM), DEVICE) is None


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
        for field, parse in (("tiles", measured._entry), ("wgrad_tiles", measured._wgrad_entry)):
            assert len(measured._load(path, field, parse, gpu)) == len(data[field])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune"])
    assert "tiles are measured on a CUDA device" in capsys.readouterr().err
