"""Where a GPU has no descriptors, boxes are read by pointers: the same numbers, whatever the tile."""

import pytest
import torch

from rir_kernels.triton.tiling.gpus import Gpu
from rir_kernels.triton.tiling.tile import ConvConfig
from rir_kernels.triton.tiling.wgrad_cost import WgradTile

from .targets import TARGETS, ieee_fp32, small_integers  # noqa: F401 (an autouse fixture)

TILES = {
    "one box": ConvConfig((2, 2, 4), 64, 16, 4, 2),
    "rows": ConvConfig((2, 1, 8), 64, 16, 4, 2, rows=2),
    "groups": ConvConfig((1, 4, 4), 64, 16, 4, 2, groups=2),
    "no padding": ConvConfig((16, 1, 1), 64, 16, 4, 2, skips=True),
    "blocks of pixels": ConvConfig((2, 4, 8), 16, 16, 4, 2, fold=True),
}
WGRAD_TILES = {
    "images": WgradTile("images", (16, 1, 1), 1, 64, 16, 4, 2),
    "rows": WgradTile("rows", (2, 2, 4), 1, 64, 16, 4, 2),
    "row": WgradTile("row", (1, 1, 16), 2, 64, 16, 4, 2),
}
# (N, C_in, C_out, H, W, kernel, stride)
SHAPES = {
    "even": (2, 16, 32, 4, 4, 3, 1),
    "odd": (3, 5, 17, 3, 5, 3, 1),
    "stride": (2, 8, 24, 5, 6, 3, 2),
    "projection": (2, 8, 16, 6, 4, 1, 2),
    "one row": (2, 8, 16, 1, 4, 3, 2),
}


@pytest.fixture
def pointers(monkeypatch):
    """A GPU as those before Hopper are."""
    from rir_kernels.triton.launch import conv, runtime, wgrad

    for module in (conv, runtime, wgrad):
        monkeypatch.setattr(module, "gpu_of", lambda tensor: Gpu(108, 163 * 1024, arch=80))


def _results(target, shape):
    from rir_kernels.common.spec import ConvBNActSpec
    from rir_kernels.triton.launch import batchnorm, conv, wgrad

    n, c_in, c_out, h, w, kernel, stride = shape
    x = small_integers((n, c_in, h, w), target, seed=1)
    weight = small_integers((c_out, c_in, kernel, kernel), target, seed=2)
    spec = ConvBNActSpec((stride,) * 2, (kernel // 2,) * 2, shortcut_channels=min(c_in, c_out) // 2)
    z, moments = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
    dz = small_integers(z.shape, target, seed=3)
    channels = torch.linspace(0.5, 2.0, c_in, device=x.device)
    upstream = batchnorm.Upstream(x, *[channels] * 4, relu=True)
    dx, partial = conv.conv_data_grad(dz, weight, shape=tuple(x.shape), spec=spec, upstream=upstream)
    dw = wgrad.conv_weight_grad(dz, x, kernel=(kernel, kernel), spec=spec)
    norm = [torch.linspace(0.5, 2.0, c_out, device=x.device)] * 4
    names = ("mean", "var", "gamma", "beta")
    y, saved = conv.conv_infer(
        x, weight, bias=None, residuals=(), spec=spec, save_z=True, **dict(zip(names, norm, strict=True))
    )
    return {
        "z": z, "mean": moments.mean, "m2": moments.m2, "count": moments.count,
        "dx": dx, "partial": partial, "dw": dw, "y": y, "saved": saved,
    }  # fmt: skip


def _assert_same_results(target, shape, monkeypatch_off, tile, wgrad_tile):
    from rir_kernels.triton.tiling.conv_tiles import use_tile
    from rir_kernels.triton.tiling.wgrad_tiles import use_wgrad_tile

    with use_tile(tile), use_wgrad_tile(wgrad_tile):
        ours = _results(target, shape)
        monkeypatch_off()
        by_descriptor = _results(target, shape)
    for name, one in ours.items():
        if one is None:  # the sums of the layer upstream are left out where a GPU has no room for them
            continue
        # compiled code adds up a tile in the order of the product's layout, which may differ: fp32, at most 256 terms
        slack = 2**-18 * by_descriptor[name].abs().max().item() if name in ("m2", "partial") else 0.0
        torch.testing.assert_close(one, by_descriptor[name], rtol=0.0, atol=slack, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("poisoned", "pointers")
@pytest.mark.parametrize(
    "shape",
    # the even ones are below, with other tiles
    [pytest.param(SHAPES[name], marks=[pytest.mark.long] * (name == "even"), id=name) for name in SHAPES],
)
@pytest.mark.parametrize("target", [target for target in TARGETS if target.id != "cpu-float16"])  # it takes minutes
def test_pointers_read_what_descriptors_do(target, shape, monkeypatch):
    """Every tensor that a layer's launches write: bit for bit, but for sums of inexact terms."""
    _assert_same_results(target, shape, monkeypatch.undo, TILES["one box"], WGRAD_TILES["images"])


@pytest.mark.usefixtures("pointers")
@pytest.mark.parametrize(
    ("tile", "wgrad_tile"),
    [
        ("rows", "rows"),
        ("groups", "row"),
        pytest.param("no padding", "images", marks=pytest.mark.long),
        pytest.param("blocks of pixels", "images", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("target", TARGETS[:1] + TARGETS[2:])
def test_every_tile_reads_by_pointers(target, tile, wgrad_tile, monkeypatch):
    _assert_same_results(target, SHAPES["even"], monkeypatch.undo, TILES[tile], WGRAD_TILES[wgrad_tile])
