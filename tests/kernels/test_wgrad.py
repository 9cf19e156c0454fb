"""Every kind of tile of the weight gradient, bit for bit on integers, and the rule that chooses among them."""

import dataclasses
from math import prod

import pytest
import torch

from rir_kernels.common import tracing
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.shapes import SHAPE_TABLE, TRANSITIONS
from rir_kernels.triton.tiling import wgrad_cost, wgrad_tiles
from rir_kernels.triton.tiling.conv_cost import cdiv
from rir_kernels.triton.tiling.gpus import H200, Gpu
from rir_kernels.triton.tiling.wgrad_cost import Split, WgradProblem, WgradTile
from rir_kernels.triton.tiling.wgrad_tiles import use_wgrad_tile

from .targets import TARGETS, assert_close, crossed, ieee_fp32, rand, small_integers  # noqa: F401 (an autouse fixture)

targets = pytest.mark.parametrize("target", TARGETS)


def _tile(walk, box, rows=1, block_co=16, block_ci=16, pack=1, skips=False):
    return WgradTile(walk, box, rows, block_co, block_ci, 4, 2, pack, skips)


TILES = {
    "images": _tile("images", (16, 1, 1)),
    "images, 32 channels": _tile("images", (16, 1, 1), block_co=32),
    "images, two rows": _tile("images", (16, 1, 1), rows=2, skips=True),
    "images, seven rows": _tile("images", (16, 1, 1), rows=7, skips=True),
    "row": _tile("row", (1, 1, 16)),
    "row, four rows": _tile("row", (1, 1, 16), rows=4, block_co=32),
    "row, pairs": _tile("row", (1, 1, 16), rows=2, pack=2),
    "images, fours": _tile("images", (16, 1, 1), pack=4, block_ci=32),
    "images, pairs": _tile("images", (16, 1, 1), rows=2, pack=2, skips=True),
}
# (N, C_in, C_out, H, W, kernel, stride, padding)
SHAPES = {
    "3x3": (2, 8, 8, 3, 4, (3, 3), (1, 1), (1, 1)),
    "odd sizes, several blocks": (1, 24, 24, 3, 3, (3, 3), (1, 1), (1, 1)),
    "valid": (1, 8, 8, 5, 6, (3, 3), (1, 1), (0, 0)),
    "wide padding": (1, 8, 8, 2, 4, (3, 3), (1, 1), (2, 2)),
    "many images": (18, 8, 8, 2, 4, (3, 3), (1, 1), (1, 1)),
    "odd channels": (2, 5, 17, 2, 4, (3, 3), (1, 1), (1, 1)),
    "stride 2": (2, 8, 16, 5, 6, (3, 3), (2, 2), (1, 1)),
    "stride 2 valid": (1, 8, 8, 6, 7, (3, 3), (2, 2), (0, 0)),
    "stride (2, 1)": (1, 8, 8, 6, 4, (3, 3), (2, 1), (1, 1)),
    "stride (1, 2)": (1, 8, 8, 3, 5, (3, 3), (1, 2), (1, 1)),
    "stride 2 one row": (1, 8, 8, 1, 4, (3, 3), (2, 2), (1, 1)),
    "stride 2 one column": (1, 8, 8, 4, 1, (3, 3), (2, 2), (1, 1)),
    "1x1": (2, 24, 8, 3, 4, (1, 1), (1, 1), (0, 0)),
    "1x1 stride 2": (2, 16, 8, 3, 6, (1, 1), (2, 2), (0, 0)),
    "a column": (2, 8, 8, 4, 4, (3, 1), (1, 1), (1, 0)),
    "a row": (2, 8, 8, 3, 4, (1, 3), (1, 1), (0, 1)),
}


@pytest.fixture
def few_places(monkeypatch):
    """A GPU so small that programs have several units, of one position or of more."""
    from rir_kernels.triton.launch import wgrad

    def make(places):
        monkeypatch.setattr(wgrad, "gpu_of", lambda device: Gpu(sms=places))
        monkeypatch.setattr(wgrad_cost, "residents", lambda *_: 1)

    return make


@pytest.mark.usefixtures("poisoned")
@crossed(5, shape=SHAPES, tile=TILES)
def test_every_tile_computes_the_same(target, shape, tile, few_places):
    few_places(5)
    _check(target, shape, tile)


@pytest.mark.usefixtures("poisoned")
@crossed(2, tile=TILES, places={"one": 1, "four": 4, "all": None})
def test_every_tile_in_every_split(target, tile, places, few_places):
    """One program, programs that end within a position, a program for every unit."""
    if places:
        few_places(places)
    _check(target, SHAPES["3x3"], tile)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("box", [(1, 4, 4), (2, 4, 4), (1, 8, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@targets
def test_whole_rows(target, stride, box):
    h, w = (8, box[2]) if box[0] == 1 else box[1:]
    _check(target, (3, 8, 8, h * stride, w * stride, (3, 3), (stride, stride), (1, 1)), _tile("rows", box))


@targets
def test_a_scale_and_a_second_run_bit_for_bit(target):
    from rir_kernels.triton.launch import wgrad

    spec = ConvBNActSpec(padding=(1, 1), branch_scale=0.5)
    x, dz = rand((2, 8, 4, 4), target, seed=1), rand((2, 8, 4, 4), target, seed=2)
    first, second = (wgrad.conv_weight_grad(dz, x, kernel=(3, 3), spec=spec) for _ in range(2))
    golden = spec.conv_scale * torch.nn.grad.conv2d_weight(x.double(), (8, 8, 3, 3), dz.double(), 1, 1)
    assert torch.equal(first, second) and first.is_contiguous(memory_format=torch.channels_last)
    assert_close(first, golden, target[1], terms=32)


@targets
def test_many_slots_are_added_in_one_order(target, few_places):
    """A program for each of 3 times 72 tiles: more slots than are added at a time, and the same bits again."""
    from rir_kernels.triton.launch import wgrad

    few_places(216)
    x, dz = rand((2, 8, 8, 9), target, seed=1), rand((2, 8, 8, 9), target, seed=2)
    with use_wgrad_tile(TILES["images, 32 channels"]):
        first, second = (wgrad.conv_weight_grad(dz, x, kernel=(1, 1), spec=ConvBNActSpec()) for _ in range(2))
    golden = torch.nn.grad.conv2d_weight(x.double(), (8, 8, 1, 1), dz.double())
    assert torch.equal(first, second)
    assert_close(first, golden, target[1], terms=144)


@targets
def test_no_images_give_zeros(target):
    from rir_kernels.triton.launch import wgrad

    x, dz = (torch.empty((0, c, 4, 4), device=target[0], dtype=target[1]) for c in (8, 16))
    dw = wgrad.conv_weight_grad(dz, x, kernel=(3, 3), spec=ConvBNActSpec(padding=(1, 1)))
    assert torch.equal(dw, torch.zeros((16, 8, 3, 3), device=target[0], dtype=target[1]))


def test_within_a_forced_tile_no_call_replays_a_plan():
    """It would repeat launches with the tiles of its first call."""
    with use_wgrad_tile(TILES["row"]):
        assert not tracing.is_plain_eager()
    assert tracing.is_plain_eager()


def _check(target, shape, tile):
    """Integers, bit for bit."""
    from rir_kernels.triton.launch import wgrad

    n, c_in, c_out, h, w, kernel, stride, padding = shape
    spec = ConvBNActSpec(stride=stride, padding=padding)
    x = small_integers((n, c_in, h, w), target, seed=1)
    dz = small_integers(spec.output_shape(x, torch.empty((c_out, c_in, *kernel), device="meta")), target, seed=2)
    with use_wgrad_tile(tile):
        dw = wgrad.conv_weight_grad(dz, x, kernel=kernel, spec=spec)
    golden = torch.nn.grad.conv2d_weight(x.double(), (c_out, c_in, *kernel), dz.double(), stride, padding)
    assert torch.equal(dw.double(), golden)


# the rule


def _problem(shape, batch=256, itemsize=2, tensor_cores=True):
    size = cdiv(shape.size, shape.stride)
    same = shape.stride == 1
    is_3x3 = same and shape.kernel == 3
    return WgradProblem(
        batch, size, size, shape.c_out, shape.c_in, (shape.kernel,) * 2, shape.kernel // 2, itemsize, tensor_cores,
        shares_rows=is_3x3, has_border=is_3x3, packs=same and shape.c_in % 8 == 0,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPE_TABLE + TRANSITIONS, ids=lambda shape: shape.name)
@pytest.mark.parametrize(
    "gpu, batch, precision",
    [
        (H200, 3, (2, True)), (H200, 256, (2, True)), (Gpu(108, 163 * 1024), 256, (2, True)),
        (Gpu(20, 64 * 1024), 3, (4, True)), (H200, 256, (4, False)),
    ],
    ids=str,
)  # fmt: skip
def test_a_choice_fits_the_gpu(shape, gpu, batch, precision):
    problem = _problem(shape, batch, *precision)
    tile = wgrad_tiles.wgrad_tile(problem, gpu)
    together = wgrad_cost.residents(problem, tile, gpu)
    assert together * wgrad_cost.shared_bytes(problem, tile) <= gpu.shared_bytes
    assert wgrad_cost.accumulators(problem, tile) <= 192
    cut = wgrad_cost.split(problem, tile, gpu)
    assert cut.programs <= gpu.sms * together
    assert cut.share * (cut.programs - 1) < cut.total <= cut.share * cut.programs
    assert prod(tile.box) in (16, 32, 64, 128) and max(tile.box) <= 256
    assert tile.rows == 1 or (problem.shares_rows and tile.box[1] == 1 and tile.walk != "rows")
    assert tile.pack == 1 or (problem.packs and problem.w % tile.pack == 0)
    assert not tile.skips or (tile.walk == "images" and problem.has_border)


@pytest.mark.parametrize("shape", SHAPE_TABLE, ids=lambda shape: shape.name)
def test_programs_fill_the_gpu(shape):
    """At least 88 % of the places' time is work, where a tile and what is written last are left aside."""
    problem = _problem(shape)
    tile = wgrad_tiles.wgrad_tile(problem)
    cut = wgrad_cost.split(problem, tile, H200)
    places = H200.sms * wgrad_cost.residents(problem, tile, H200)
    assert cut.total / (cut.share * places) >= 0.88


def test_a_split_by_hand():
    """Seven positions of 5, 5, 5, 4, 4, 4 and 4 tiles by three."""
    cut = Split(positions=7, tiles=5, edge_tiles=4, total=31, share=3)
    owners = [[tile // 3 for tile in range(first, first + count)] for first, count in _positions(cut, blocks=3)]
    assert cut.programs == 11 == 1 + max(map(max, owners))
    assert cut.slots >= max(len(set(position)) for position in owners)
    assert cut.parts >= sum(len(set(position)) for position in owners)
    even = Split(positions=7, tiles=6, edge_tiles=3, total=30, share=3)
    assert (even.is_even, even.programs, even.slots, even.parts) == (True, 10, 2, 10)


def _positions(cut, blocks):
    first = 0
    for position in range(cut.positions):
        count = cut.tiles if position < blocks else cut.edge_tiles
        yield first, count
        first += count


@pytest.mark.parametrize(("padding", "pack", "columns"), [(1, 1, 3), (1, 2, 3), (1, 4, 3), (0, 2, 2), (2, 2, 2)])
def test_columns_of_a_kernel_between_packs(padding, pack, columns):
    problem = dataclasses.replace(_problem(SHAPE_TABLE[4]), padding_w=padding)
    found = {(a + j - padding) // pack for a in range(pack) for j in range(3)}
    assert len(found) == columns == wgrad_cost.packed_columns(problem, pack)
    assert min(found) == -wgrad_cost.packed_padding(problem, pack)


def test_the_cheapest_tile_is_taken():
    problem = _problem(SHAPE_TABLE[8])
    best = wgrad_tiles.wgrad_tile(problem)
    others = [best._replace(rows=1), best._replace(block_ci=642)]
    assert all(wgrad_cost.clocks(problem, best, H200) < wgrad_cost.clocks(problem, other, H200) for other in others)
    assert wgrad_cost.clocks(problem, best, H200) <= 1.05 * wgrad_tiles.ranked_wgrad_tiles(problem)[0][0]


def test_clocks_by_hand():
    # 64 to 64 channels of 1x1: 528 tiles of 64 pixels, four for each SM
    problem = WgradProblem(64, 33, 16, 64, 64, (1, 1), 0, 2, True, False, False, False)
    tile = WgradTile("images", (64, 1, 1), 1, 64, 64, num_warps=4, num_stages=4)
    gpu = dataclasses.replace(H200, shared_bytes=70 * 1024)  # for one program
    # four slices of 32 bytes: tensor cores 4 * 32, shared memory 4 * (32 + 32), L2 128 channels of 128 bytes
    assert wgrad_cost.split(problem, tile, gpu) == Split(1, 528, 528, 528, 4)
    l2 = 128 * 128 / 36
    late = (1000 + l2 - 128) / 2  # two steps ahead at least
    sums = 64 * 64 * 4
    loop = max(4 * max(l2 + 64, late), 528 * 64 * 128 * 2 / (20 * 132))  # or as long as memory takes for both tensors
    expected = 1600 + loop + sums / 20 + 1600 + 1600 + 132 * sums / (20 * 132)
    assert wgrad_cost.clocks(problem, tile, gpu) == pytest.approx(expected)
