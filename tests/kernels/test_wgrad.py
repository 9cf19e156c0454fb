"""Every kind of tile of the weight gradient, bit for bit on integers, and the rule that chooses among them."""

import dataclasses

import pytest
import torch

from rir_kernels.spec import ConvBNActSpec
from rir_kernels.triton import wgrad_config
from rir_kernels.triton.cost import H200, Gpu, cdiv
from rir_kernels.triton.shapes import SHAPE_TABLE, TRANSITIONS
from rir_kernels.triton.wgrad_config import Split, WgradProblem, WgradTile, use_wgrad_tile

from .targets import TARGETS, ieee_fp32, small_integers  # noqa: F401 (an autouse fixture)


def _tile(walk, box, rows=1, steps=2, block_co=16, block_ci=16, pack=1):
    return WgradTile(walk, box, rows, steps, block_co, block_ci, num_warps=4, num_stages=2, pack=pack)


TILES = {
    "images": _tile("images", (16, 1, 1)),
    "images, a step a unit": _tile("images", (16, 1, 1), steps=1, block_co=32),
    "images, two rows": _tile("images", (16, 1, 1), rows=2),
    "images, seven rows": _tile("images", (16, 1, 1), rows=7),
    "row": _tile("row", (1, 1, 16), steps=3),
    "row, four rows": _tile("row", (1, 1, 16), rows=4, block_co=32),
    "row, pairs": _tile("row", (1, 1, 16), rows=2, pack=2),
    "images, fours": _tile("images", (16, 1, 1), pack=4, block_ci=32),
}
# (N, C_in, C_out, H, W, kernel, stride, padding)
SHAPES = {
    "3x3": (2, 8, 16, 3, 4, (3, 3), (1, 1), (1, 1)),
    "odd sizes, several blocks": (1, 24, 40, 3, 5, (3, 3), (1, 1), (1, 1)),
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


def _operands(shape, target):
    n, c_in, c_out, h, w, kernel, stride, padding = shape
    spec = ConvBNActSpec(stride=stride, padding=padding)
    x = small_integers((n, c_in, h, w), target, seed=1)
    weight = torch.empty((c_out, c_in, *kernel), device="meta")
    dz = small_integers(spec.output_shape(x, weight), target, seed=2)
    return spec, dz, x, tuple(weight.shape)


def _golden(dz, x, shape, spec):
    return torch.nn.grad.conv2d_weight(x.double(), shape, dz.double(), spec.stride, spec.padding)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_computes_the_same(target, shape, tile):
    from rir_kernels.triton.launch import wgrad

    spec, dz, x, weight = _operands(shape, target)
    with use_wgrad_tile(tile):
        dw = wgrad.conv_weight_grad(dz, x, kernel=weight[2:], spec=spec)
    assert torch.equal(dw.double(), _golden(dz, x, weight, spec))
