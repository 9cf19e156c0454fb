"""Every kind of tile gives the same result, and the rule that chooses among them keeps within the GPU."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.shapes import SHAPE_TABLE
from rir_kernels.triton.tiling import batches, gpus
from rir_kernels.triton.tiling.conv_cost import Problem, accumulators, cdiv, clocks, residents, stage_bytes
from rir_kernels.triton.tiling.conv_tiles import conv_config, holds_upstream, pixel_box, ranked_tiles, row_box, use_tile
from rir_kernels.triton.tiling.gpus import H200, Gpu
from rir_kernels.triton.tiling.tile import ConvConfig

from .targets import assert_close, crossed, ieee_fp32, rand, small_integers  # noqa: F401 (an autouse fixture)


def _tile(box, block_c=64, **kind):
    return ConvConfig(box, block_c, block_k=16, num_warps=4, num_stages=2, **kind)


TILES = {
    "blocks of pixels": _tile((2, 4, 8), 16, fold=True),  # where both sides are even
    "two rows": _tile((2, 1, 8), rows=2),
    "four rows": _tile((1, 1, 16), rows=4),
    "two groups": _tile((1, 4, 4), groups=2),
    "three groups": _tile((1, 4, 4), groups=3),
    "rows and groups": _tile((2, 1, 8), groups=2, rows=2),
    "no padding": _tile((16, 1, 1), groups=2, skips=True),
    "one box": _tile((2, 2, 4)),
}
# (N, C_in, C_out, H, W, kernel, padding): tiles that hang over in every direction, rows that are none
SHAPES = {
    "even": (2, 16, 64, 4, 4, (3, 3), (1, 1)),
    "over the edges": (3, 24, 68, 3, 5, (3, 3), (1, 1)),
    "many channels": (1, 8, 136, 3, 3, (3, 3), (1, 1)),
    "odd channels": (2, 5, 33, 5, 3, (3, 3), (1, 1)),
    "many images": (18, 8, 8, 2, 3, (3, 3), (1, 1)),
    "without padding": (2, 8, 16, 5, 7, (3, 3), (0, 0)),
    "wide padding": (1, 8, 8, 3, 4, (3, 3), (2, 2)),
    "a column": (2, 8, 8, 6, 4, (3, 1), (1, 0)),
    "a row": (2, 8, 8, 4, 6, (1, 3), (0, 1)),
}


@pytest.fixture
def chosen(tile):
    with use_tile(tile):
        yield


@pytest.mark.usefixtures("poisoned", "chosen")
@crossed(6, shape=SHAPES, tile=TILES)
def test_every_tile_computes_the_same(target, shape, tile):
    _check_integers(target, shape)


# (N, C_in, C_out, H, W, channels of the tile)
THIN = {
    "16 channels": (3, 16, 16, 6, 10, 16),
    "32 channels": (1, 32, 32, 2, 12, 32),
    "channels of their own": (3, 10, 24, 10, 2, 32),
    "two blocks of channels": (2, 32, 24, 4, 4, 16),
}


@pytest.mark.usefixtures("poisoned")
@crossed(2, shape=THIN)
def test_blocks_of_pixels_compute_the_same(target, shape):
    from rir_kernels.triton.launch import runtime

    *shape, block_c = shape
    folds = []

    def start(kernel, programs, *args, **options):
        folds.extend(value is not None for name, value in options.items() if name == "FOLD_2X2")
        kernel[(programs,)](*args, **options)

    with use_tile(_tile((2, 4, 8), block_c, fold=True)), runtime.intercepted(start):
        _check_integers(target, (*shape, (3, 3), (1, 1)))
    assert folds == [True] * 3


def _check_integers(target, shape):
    """Bit for bit: the convolution with an identity, inference, and the data gradient."""
    from rir_kernels.triton.launch import batchnorm, conv

    n, c_in, c_out, h, w, kernel, padding = shape
    x = small_integers((n, c_in, h, w), target, seed=1)
    weight = small_integers((c_out, c_in, *kernel), target, seed=2)
    z = F.conv2d(x.double(), weight.double(), None, 1, padding)
    same = z.shape[2:] == x.shape[2:]
    identity = min(c_in, c_out) // 2 if same else 0
    spec = ConvBNActSpec(padding=padding, shortcut_channels=identity)
    z[:, :identity] += x[:, :identity].double() if same else 0

    ours, moments = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
    assert torch.equal(ours.double(), z)
    statistics = batchnorm.bn_finalize(moments, 1e-5)
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    terms = z[:, 0].numel()
    assert_close(statistics.mean, mean, torch.float32, terms=terms, name="mean")
    assert_close(statistics.var, var, torch.float32, terms=terms, name="var")

    ones, zeros = (torch.full((c_out,), value, device=x.device) for value in (1.0, 0.0))
    plain = dataclasses.replace(spec, eps=0.0)
    y, saved = conv.conv_infer(
        x, weight, bias=None, residuals=(), spec=plain, mean=zeros, var=ones, gamma=ones, beta=zeros, save_z=True
    )
    assert torch.equal(saved.double(), z) and torch.equal(y.double(), z.relu())

    dz = small_integers(z.shape, target, seed=3)
    dx = torch.nn.grad.conv2d_input(x.shape, weight.double(), dz.double(), 1, padding)
    dx[:, :identity] += dz[:, :identity].double() if same else 0
    ours, _ = conv.conv_data_grad(dz, weight, shape=tuple(x.shape), spec=spec)
    assert torch.equal(ours.double(), dx)


@pytest.mark.usefixtures("chosen")
@crossed(
    2,
    tile={name: TILES[name] for name in ("two rows", "rows and groups", "blocks of pixels")},
    post_norm={"before the norm": False, "after the norm": True},
)
def test_residuals_and_bias_join_every_row(target, tile, post_norm):
    from rir_kernels.triton.launch import conv

    h = 6 if tile.fold else 5
    spec = ConvBNActSpec(padding=(1, 1), post_norm=post_norm, branch_scale=0.5)
    x, weight = rand((2, 8, h, 6), target, seed=1), rand((72, 8, 3, 3), target, seed=2, scale=0.1)
    residuals = rand((2, 40, h, 6), target, seed=3), rand((2, 72, h, 6), target, seed=4)
    bias = rand((72,), target, seed=5)
    mean, gamma, beta = (rand((72,), (target[0], torch.float32), seed=seed) for seed in (6, 7, 8))
    var = mean.abs() + 1.0
    y, _ = conv.conv_infer(
        x, weight, bias=bias, residuals=residuals, spec=spec, mean=mean, var=var, gamma=gamma, beta=beta, save_z=False
    )
    identity = residuals[1].double()
    identity[:, :40] += residuals[0].double()

    def norm(z):
        return F.batch_norm(z, mean.double(), var.double(), gamma.double(), beta.double(), False, 0.0, spec.eps)

    branch = F.conv2d(x.double(), weight.double(), bias.double(), 1, 1)
    golden = 0.5 * norm(branch) + identity if post_norm else norm(0.5 * branch + identity)
    assert_close(y, golden.relu(), target[1], terms=72)


# the rule


def _problem(shape, batch=256, itemsize=2):
    return Problem(batch, shape.size, shape.size, shape.c_out, shape.c_in, (3, 3), itemsize, (1, 1))


@pytest.mark.parametrize("gpu", [H200, Gpu(108, 163 * 1024), Gpu(128, 99 * 1024), Gpu(20, 64 * 1024)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("batch", [1, 3, 256])
def test_a_choice_fits_the_gpu(gpu, itemsize, batch):
    for shape in SHAPE_TABLE:
        for padding in (None, (0, 0), (1, 1)):
            problem = dataclasses.replace(_problem(shape, batch, itemsize), padding=padding)
            tile = conv_config(problem, True, gpu)
            assert tile.num_stages * stage_bytes(tile, problem) <= gpu.shared_bytes
            assert accumulators(tile) <= 192
            assert tile.rows == 1 or (padding and tile.box[1] == 1)
            assert not tile.fold or (padding == (1, 1) and min(tile.box[1:]) > 1 and tile.groups == tile.rows == 1)
            assert not tile.skips or (padding == (1, 1) and tile.box[1:] == (1, 1) and tile.rows == 1)
            assert all(1 <= side <= 256 and side & (side - 1) == 0 for side in tile.box)
            assert tile.block_k * itemsize <= 128  # the widest swizzle
            chosen_for = dataclasses.replace(problem, n=batches.rounded(batch))
            assert clocks(chosen_for, tile, gpu) <= 1.3 * ranked_tiles(chosen_for, gpu)[0][0]


def test_few_tiles_serve_the_batches():
    """By hand: each for as many batches in a row as it is fast enough for; the best of those that last as long."""
    slow = {
        "many": [1.0] * 5 + [1.31] * 6,
        "again for one": [1.0] * 5 + [1.31] * 5 + [1.0],
        "few": [1.1] * 5 + [1.0, 1.0, 1.2, 1.2, 1.2, 1.2],
        "few, faster": [1.1] * 5 + [1.0, 1.0, 1.1, 1.1, 1.1, 1.1],
        "best of two": [2.0] * 7 + [1.0] * 4,
    }
    clocks = 1000 * torch.tensor([*slow.values()], dtype=torch.float64).T.numpy()
    serving = batches.serve([*slow], clocks)
    assert [*serving] == [1 << power for power in range(10, -1, -1)]
    assert [*serving.values()] == ["many"] * 5 + ["few, faster"] * 6
    assert [batches.rounded(n) for n in (1, 3, 64, 65, 1024, 5000)] == [1, 4, 64, 128, 1024, 1024]


def test_the_cheapest_tile_is_taken():
    problem = _problem(SHAPE_TABLE[0])
    best = conv_config(problem, True)
    others = [best._replace(rows=1), best._replace(box=(2, 1, 32)), _tile((1, 4, 32))]
    assert all(clocks(problem, best, H200) < clocks(problem, other, H200) for other in others)


def test_clocks_by_hand():
    # 64 channels to 64, 132 tiles of 128 pixels: one for each SM, one turn
    problem = Problem(132, 8, 16, 64, 64, (1, 1), 2)
    tile = ConvConfig((1, 8, 16), 64, 64, num_warps=4, num_stages=4)
    # four slices of 32 bytes; tensor cores 4 * 64, shared memory 4 * (48 + 48), L2 (128 + 64) * 128 / 36
    assert clocks(problem, tile, H200) == pytest.approx(max(256, 384, 192 * 128 / 36) + 64 + 1600 + 64 * 128 * 2 / 20)
    assert residents(tile, problem, H200) == 2  # 96 KB each
    # another image is another turn of the loop; its ends hide
    more = dataclasses.replace(problem, n=133)
    assert clocks(more, tile, H200) - clocks(problem, tile, H200) == pytest.approx(192 * 128 / 36 + 64)


def test_a_chain_of_products_waits_for_each(monkeypatch):
    monkeypatch.setattr("rir_kernels.triton.tiling.conv_cost.L2_BYTES", 1000)  # the chain alone is looked at
    # 264 tiles of two rows of 64 pixels: 3 columns, one block of 64 channels; 2 rows x 3 taps are 6 products a column
    problem = Problem(264, 2, 64, 64, 64, (3, 3), 2, (1, 1))
    tile = ConvConfig((1, 1, 64), 64, 64, num_warps=4, num_stages=3, rows=2)
    assert residents(tile, problem, H200) == 1  # 168 KB
    # four wgmmas of 64 columns, 32 clocks each, and then 80 until it goes on; two turns
    rest = 1600 + 64 * 64 * 2 * 2 / 20
    assert clocks(problem, tile, H200) == pytest.approx(2 * (3 * (6 * (4 * 32 + 80) + 64) + rest))


def test_rows_read_less():
    problem = Problem(256, 32, 32, 128, 128, (3, 3), 2, (1, 1))
    alone = ConvConfig((4, 1, 32), 128, 32, num_warps=8, num_stages=3)
    shared = alone._replace(rows=2)
    # in a step: 3 weights of 128 rows and 4 boxes of 128 pixels, where one tap is one of each
    assert stage_bytes(shared, problem) == (3 * 128 + 4 * 128) * 64
    assert stage_bytes(alone, problem) == (128 + 128) * 64
    assert clocks(problem, shared, H200) < clocks(problem, alone, H200)


def test_a_folded_tile_by_hand():
    # 132 tiles of 16 x 16 pixels, 64 blocks: one for each SM; four steps of four boxes, four weights, four products
    problem = Problem(132, 16, 16, 16, 16, (3, 3), 2, (1, 1))
    tile = ConvConfig((1, 16, 16), 16, 16, num_warps=4, num_stages=3, fold=True)
    assert stage_bytes(tile, problem) == 4 * (64 + 64) * 32
    # 32 bytes a row: a box's count as 64, and 9 of 16 weights are read
    loop = 4 * ((4 * 64 * 64 + 4 * 64 * 32 * 9 / 16) / 36 + 64)
    assert clocks(problem, tile, H200) == pytest.approx(loop + 1600 + 256 * 16 * 2 / 20)


def test_thin_networks_fold():
    ranked = ranked_tiles(Problem(256, 32, 32, 16, 16, (3, 3), 2, (1, 1)))
    assert ranked[0][1].fold
    assert min(clocks for clocks, tile in ranked if not tile.fold) > 1.3 * ranked[0][0]
    for problem in (
        Problem(256, 31, 32, 16, 16, (3, 3), 2, (1, 1)),
        Problem(256, 32, 32, 16, 16, (3, 3), 2, (0, 0)),
        Problem(256, 32, 32, 16, 16, (1, 3), 2, (0, 1)),
        Problem(256, 32, 32, 48, 48, (3, 3), 2, (1, 1)),
    ):
        assert not any(tile.fold for _, tile in ranked_tiles(problem))


@pytest.mark.parametrize(("n", "h", "w"), [(256, 7, 7), (1, 32, 32), (3, 5, 9), (256, 56, 56), (2, 1, 1)])
@pytest.mark.parametrize("pixels", [16, 64, 256])
def test_boxes(n, h, w, pixels):
    for box in (pixel_box(n, h, w, pixels), row_box(n, w, pixels)):
        assert box[0] * box[1] * box[2] == pixels
        assert box[0] <= 256
    assert row_box(n, w, pixels)[1] == 1
    everything = [(pixels // b, 1, b) for b in (1, 2, 4, 8, 16, 32, 64, 128, 256) if b <= pixels and pixels // b <= 256]
    assert cdiv(n, row_box(n, w, pixels)[0]) * cdiv(w, row_box(n, w, pixels)[2]) == min(
        cdiv(n, b[0]) * cdiv(w, b[2]) for b in everything
    )


def test_limits_are_those_of_tritons_release(monkeypatch):
    """Of the latest known one that is not later than it: an unknown release takes the newest one's."""
    of = {release: gpus.limits_of("wgmma", release) for release in ((3, 6), (3, 7), (3, 8), (3, 9), (3, 10), (4, 0))}
    assert of[3, 6] == of[3, 7] == of[3, 9] == of[3, 10] == of[4, 0] == gpus.LIMITS["wgmma"]
    assert of[3, 8] == dataclasses.replace(of[3, 6], sums_beside_upstream=128)
    assert gpus.limits_of("mma", (3, 8)) == gpus.LIMITS["mma"]
    tile = ConvConfig((1, 16, 16), 64, 64, 8, 4, groups=3)
    for release, holds in (((3, 8), False), ((3, 9), True), (None, True)):
        monkeypatch.setattr(gpus, "triton_release", lambda release=release: release)
        assert holds_upstream(tile, 2, H200) == holds
