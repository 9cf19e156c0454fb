"""A GPU that has too little for a tile gets a smaller one: the same numbers, one warning, and no second try."""

import warnings

import pytest
import torch
from triton.runtime.errors import OutOfResources

from rir_kernels.triton.launch import tile_fallback
from rir_kernels.triton.tiling.gpus import Gpu

from .targets import TARGETS, ieee_fp32, small_integers  # noqa: F401 (an autouse fixture)

LIMIT = 24 * 1024


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(tile_fallback, "_kept", {})
    monkeypatch.setattr(tile_fallback, "_warned", False)


@pytest.fixture
def scarce(monkeypatch):
    """A GPU with less memory than its description says; (kernel, bytes it asked for, whether it ran), in order."""
    from rir_kernels.triton.launch import conv, runtime, wgrad

    asked = []

    def start(kernel, programs, *args, **options):
        if kernel.__name__.startswith("_conv"):
            size = options["num_stages"] * options.get("ROWS", 1) * 10 * 1024
            asked.append((kernel.__name__, size, size <= LIMIT))
            if size > LIMIT:
                raise OutOfResources(size, LIMIT, "shared memory")
        kernel[(programs,)](*args, **options)

    for module in (conv, wgrad):
        monkeypatch.setattr(module, "uses_tensor_cores", lambda tensor: True)
        monkeypatch.setattr(module, "gpu_of", lambda tensor: Gpu(20, 96 * 1024))
    with runtime.intercepted(start):
        yield asked


def _results(target, stride):
    from rir_kernels.common.spec import ConvBNActSpec
    from rir_kernels.triton.launch import conv, wgrad

    x = small_integers((1, 40, 4, 4), target, seed=1)
    weight = small_integers((40, 40, 3, 3), target, seed=2)
    spec = ConvBNActSpec((stride,) * 2, (1, 1))
    z, _ = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
    dz = small_integers(z.shape, target, seed=3)
    dx, _ = conv.conv_data_grad(dz, weight, shape=tuple(x.shape), spec=spec)
    return z, dx, wgrad.conv_weight_grad(dz, x, kernel=(3, 3), spec=spec)


def test_stages_go_first_and_then_the_cheapest_that_fits():
    from rir_kernels.triton.tiling.conv_cost import Problem, stage_bytes
    from rir_kernels.triton.tiling.conv_tiles import ranked_tiles

    problem = Problem(256, 16, 16, 192, 192, (3, 3), 2, (1, 1))
    ranked = ranked_tiles(problem)

    def needs(tile):
        return tile.num_stages * stage_bytes(tile, problem)

    def below(tile, limit):
        error = OutOfResources(needs(tile), limit, "shared memory")
        return tile_fallback._next_below(tile, error, needs, ranked)

    tile = next(tile for _, tile in ranked if tile.num_stages == 4)
    fewer = below(tile, needs(tile) - 1)
    assert fewer.num_stages == 3 and fewer.box == tile.box and needs(fewer) < needs(tile)
    small = below(tile, needs(tile) // 4)
    fits = [other for _, other in ranked if needs(other) <= needs(tile) // 4]
    assert small == fits[0]
    # of what no estimate knows it still goes down, and at last gives up
    assert needs(below(fits[0], 10**9)) < needs(fits[0])
    assert below(min((tile for _, tile in ranked), key=needs), 1) is None


def test_what_was_refused_is_not_tried_again():
    from rir_kernels.triton.tiling.tile import ConvConfig

    tried = []

    def attempt(tile):
        tried.append(tile.num_stages)
        if tile.num_stages > 2:
            raise OutOfResources(tile.num_stages, 2, "shared memory")
        return tile

    tile = ConvConfig((1, 4, 4), 64, 16, 4, num_stages=4)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="rir_kernels")
            kept = tile_fallback.with_tile_fallback(
                "launch", "kernel", tile, attempt, needs=lambda tile: tile.num_stages, ranked=lambda: []
            )
    assert kept.num_stages == 2 and tried == [4, 2, 2]


def test_a_tile_that_was_asked_for_is_not_replaced(scarce):
    from rir_kernels.triton.tiling.conv_tiles import use_tile
    from rir_kernels.triton.tiling.tile import ConvConfig

    target = torch.device("cpu"), torch.float32
    with use_tile(ConvConfig((2, 8, 8), 128, 32, 8, 4)), pytest.raises(OutOfResources):
        _results(target, 1)
