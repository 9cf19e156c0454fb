"""The data gradient at strides of two: one launch, exact on integers, whatever planes there are."""

import pytest
import torch

from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.tiling.conv_cost import Problem, clocks
from rir_kernels.triton.tiling.conv_tiles import use_tile
from rir_kernels.triton.tiling.gpus import H200
from rir_kernels.triton.tiling.tile import ConvConfig

from .targets import TARGETS, ieee_fp32, small_integers  # noqa: F401 (an autouse fixture)

TILES = {
    "one box": ConvConfig((1, 2, 8), 64, 16, 4, 2),
    "two groups": ConvConfig((4, 2, 2), 64, 16, 4, 2, groups=2),
    # a plane's pixels are no neighbours: the rest of these is left out
    "rows": ConvConfig((2, 1, 8), 64, 16, 4, 2, rows=2),
    "skips": ConvConfig((16, 1, 1), 64, 16, 4, 2, skips=True),
    "blocks": ConvConfig((1, 4, 4), 64, 16, 4, 2, fold=True),
}
# (C_in, C_out, H, W, kernel, stride, padding, shortcut channels)
CASES = {
    "even": (8, 16, 4, 6, 3, (2, 2), 1, 0),
    "odd, with a shortcut": (24, 8, 5, 7, 3, (2, 2), 1, 8),
    "even and odd, several blocks": (72, 8, 4, 5, 3, (2, 2), 1, 5),
    "odd and even, odd channels": (7, 5, 5, 4, 3, (2, 2), 1, 3),
    "valid, even": (8, 8, 6, 4, 3, (2, 2), 0, 0),
    "valid, odd": (5, 3, 3, 7, 3, (2, 2), 0, 0),
    "one pixel": (8, 8, 1, 1, 3, (2, 2), 1, 8),
    "one row": (8, 8, 1, 4, 3, (2, 2), 1, 8),
    "one column, odd channels": (3, 8, 5, 1, 3, (2, 2), 1, 0),
    "1x1": (16, 8, 4, 6, 1, (2, 2), 0, 0),
    "1x1 odd, with a shortcut": (8, 16, 5, 3, 1, (2, 2), 0, 8),
    "1x1 odd channels, one row": (6, 10, 1, 5, 1, (2, 2), 0, 4),
    "1x1 with padding": (8, 8, 3, 4, 1, (2, 2), 1, 0),
    "stride (2, 1)": (8, 8, 5, 3, 3, (2, 1), 1, 8),
    "stride (1, 2)": (8, 8, 3, 5, 3, (1, 2), 1, 0),
    "1x1, stride (1, 2)": (8, 8, 2, 5, 1, (1, 2), 0, 0),
}


def _checked_launches(case, target):
    """The launches but for the weight's, after a look at what they left."""
    from rir_kernels.triton.launch import conv, runtime

    c_in, c_out, h, w, kernel, stride, padding, shortcut = case
    spec = ConvBNActSpec(stride, (padding,) * 2, shortcut_channels=shortcut, branch_scale=0.5 if shortcut else 1.0)
    weight = small_integers((c_out, c_in, kernel, kernel), target, seed=2)
    dz = small_integers(spec.output_shape(torch.empty((3, c_in, h, w), device="meta"), weight), target, seed=3)
    found = []

    def start(launched, programs, *args, **options):
        found.append((launched.fn.__name__, programs, options))
        launched[(programs,)](*args, **options)

    with runtime.intercepted(start):
        dx, _ = conv.conv_data_grad(dz, weight, shape=(3, c_in, h, w), spec=spec)
    golden = spec.conv_scale * torch.nn.grad.conv2d_input(dx.shape, weight.double(), dz.double(), stride, padding)
    if shortcut:
        golden[:, :shortcut, :: stride[0], :: stride[1]] += dz[:, :shortcut].double()
    assert torch.equal(dx.double(), golden)
    return [launch for launch in found if launch[0] != "_pack_weight_kernel"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("target", TARGETS)
def test_one_launch_writes_every_pixel(case, target):
    with use_tile(TILES["one box"]):
        ((kernel, _, options),) = _checked_launches(case, target)
    assert kernel == "_conv_bwd_data_kernel"
    _, _, h, w, _, stride, *_ = case
    assert len(options["PLANES"]) == min(h, stride[0]) * min(w, stride[1])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile(tile, target):
    with use_tile(tile):
        _checked_launches(CASES["even and odd, several blocks"], target)


@pytest.mark.parametrize("target", TARGETS)
def test_the_rules_tile(target):
    """And the longest programs first: of a 3x3 with padding the odd rows and columns meet two taps."""
    ((_, programs, options),) = _checked_launches(CASES["even"], target)
    assert options["PLANES"] == ((1, 1), (0, 1), (1, 0), (0, 0)) and programs % 4 == 0
    ((_, _, options),) = _checked_launches(CASES["valid, even"], target)
    assert options["PLANES"] == ((0, 0), (0, 1), (1, 0), (1, 1))


@pytest.mark.parametrize("target", TARGETS)
def test_no_images(target):
    from rir_kernels.triton.launch import conv

    dz, weight = (torch.empty(shape, device=target[0], dtype=target[1]) for shape in ((0, 8, 2, 2), (8, 16, 3, 3)))
    for stride in (1, 2):
        spec = ConvBNActSpec((stride,) * 2, (1, 1))
        shape = (0, 16, 2 * stride, 2 * stride)
        assert conv.conv_data_grad(dz, weight, shape=shape, spec=spec)[0].shape == shape


def test_planes_share_the_taps():
    """Four times the programs, each with a quarter of the loop."""
    tile = ConvConfig((4, 8, 8), 64, 64, 8, 4, groups=3)
    whole = Problem(1056, 8, 8, 192, 384, (3, 3), 2)
    planes = Problem(264, 8, 8, 192, 384, (3, 3), 2, planes=4)
    once, four = clocks(whole, tile, H200), clocks(planes, tile, H200)
    ends = 2 * (1600 + 192 * 256 * 2 / 20)  # two turns
    assert four - ends == pytest.approx((once - ends) / 4)
