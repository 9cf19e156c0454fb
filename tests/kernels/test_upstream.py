"""The sums of the layer upstream, which the data gradient computes beside dx, against its own reduction and fp64."""

import pytest
import torch

from rir_kernels.backends import fused
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.common.versions import triton_release
from rir_kernels.triton.tiling.conv_tiles import holds_upstream, use_tile
from rir_kernels.triton.tiling.tile import ConvConfig

from .targets import TARGETS, assert_close, crossed, ieee_fp32, rand, small_integers  # noqa: F401 (an autouse fixture)
from .test_tiles import TILES

pytestmark = pytest.mark.usefixtures("poisoned")
targets = pytest.mark.parametrize("target", TARGETS)

# (N, C_in, C_out, H, W, kernel, padding, shortcut): whole tiles, and such that hang over in every direction
SHAPES = {
    "whole": (2, 16, 24, 4, 8, (3, 3), (1, 1), 0),
    "over the edges": (3, 72, 16, 6, 10, (3, 3), (1, 1), 8),
    "odd sides": (2, 24, 8, 5, 7, (3, 3), (1, 1), 5),
    "many channels": (1, 136, 8, 3, 3, (3, 3), (1, 1), 0),
    "without padding": (2, 16, 8, 5, 7, (3, 3), (0, 0), 0),
    "1x1": (2, 24, 8, 3, 4, (1, 1), (0, 0), 0),
}
NORMS = {"relu": (True, True), "no relu": (False, True), "not affine": (True, False)}  # (relu, affine)
ROUNDED = 1e-2  # a ReLU's input nearer to zero may fall on either side of it


@pytest.fixture
def chosen(tile):
    with use_tile(tile):
        yield


def _operands(shape, target, make):
    n, c_in, c_out, h, w, kernel, padding, shortcut = shape
    spec = ConvBNActSpec(padding=padding, shortcut_channels=shortcut, branch_scale=0.5 if shortcut else 1.0)
    z = make((n, c_in, h, w), target, seed=1)
    weight = make((c_out, c_in, *kernel), target, seed=2)
    return spec, z, weight, make(spec.output_shape(z, weight), target, seed=3)


def _channels(z, seed, affine=True):
    """(mean, invstd, gamma, beta) of z's channels."""
    target = z.device, torch.float32
    mean, gamma, beta = (rand((z.shape[1],), target, seed=seed + i) for i in range(3))
    invstd = 1 / (1 + rand((z.shape[1],), target, seed=seed + 3).abs())
    gamma += gamma.sign()
    return (mean, invstd, gamma, beta) if affine else (mean, invstd, None, None)


def _terms(dx, z, mean, invstd, gamma, beta, relu):
    """(u, dy', dy' * xhat) in fp64."""
    mean, invstd, gamma, beta = (
        (torch.full_like(mean, default) if t is None else t).double()[:, None, None]
        for t, default in ((mean, 0), (invstd, 0), (gamma, 1.0), (beta, 0.0))
    )
    xhat = (z.double() - mean) * invstd
    u = gamma * xhat + beta
    dy = dx.double() * (u > 0) if relu else dx.double()
    return u, dy, dy * xhat


@crossed(6, tile=TILES, shape=SHAPES)
@pytest.mark.usefixtures("chosen")
def test_integers_bit_for_bit(target, tile, shape):
    """Every sum is exact, so a single wrong pixel, channel or mask is seen; dx stays what it is without the sums."""
    from rir_kernels.triton.launch import batchnorm, conv

    spec, z, weight, dz = _operands(shape, target, small_integers)
    mean = small_integers((1, z.shape[1], 1, 1), (z.device, torch.float32), seed=4).flatten()
    gamma = 1 - 2 * small_integers((1, z.shape[1], 1, 1), (z.device, torch.float32), seed=5).flatten().abs()
    norm = mean, torch.full_like(mean, 2.0), gamma, torch.full_like(mean, 0.5)
    dx, partial = conv.conv_data_grad(
        dz, weight, shape=tuple(z.shape), spec=spec, upstream=batchnorm.Upstream(z, *norm, relu=True)
    )
    alone, none = conv.conv_data_grad(dz, weight, shape=tuple(z.shape), spec=spec)
    assert torch.equal(dx, alone) and none is None
    sums = batchnorm.bn_sum(partial, 1.0)
    _, *terms = _terms(dx, z, *norm, relu=True)
    for ours, golden in zip(sums, terms, strict=True):
        assert torch.equal(ours.double(), golden.sum((0, 2, 3)))
    names = ("mean", "invstd", "gamma", "beta")
    theirs = batchnorm.bn_reduce(dx, z, None, **dict(zip(names, norm, strict=True)), spec=ConvBNActSpec())
    assert all(torch.equal(*pair) for pair in zip(sums, theirs, strict=True))


@crossed(4, tile=TILES, norm=NORMS)
@pytest.mark.usefixtures("chosen")
def test_as_exact_as_the_reduction(target, tile, norm):
    """Sums of the dx that is stored, rounded; scaled as `bn_sum` is told."""
    from rir_kernels.triton.launch import batchnorm, conv
    from rir_kernels.triton.launch.runtime import gpu_of

    relu, affine = norm
    spec, z, weight, dz = _operands(SHAPES["over the edges"], target, rand)
    norm = _channels(z, seed=4, affine=affine)
    if relu:  # |gamma| is at least one
        near = _terms(z, z, *norm, relu)[0].abs() < ROUNDED
        z = torch.where(near, z + (8 * ROUNDED / norm[1])[:, None, None].to(z.dtype), z)
        assert (_terms(z, z, *norm, relu)[0].abs() > ROUNDED).all()
        z = z.contiguous(memory_format=torch.channels_last)
    upstream = batchnorm.Upstream(z, *norm, relu=relu)
    dx, partial = conv.conv_data_grad(dz, weight, shape=tuple(z.shape), spec=spec, upstream=upstream)
    if partial is None and gpu_of(z).arch // 10 != 9:  # Hopper has room for them beside each of these tiles
        pytest.skip("this GPU's registers have no room for the sums beside blocks of pixels")
    sums = batchnorm.bn_sum(partial, 0.7)
    _, *terms = _terms(dx, z, *norm, relu)
    pixels = z[:, 0].numel()
    for name, ours, golden in zip(("dbeta", "dgamma"), sums, terms, strict=True):
        assert_close(ours, 0.7 * golden.sum((0, 2, 3)), torch.float32, terms=4 * pixels, name=name)


@targets
def test_the_mask_of_a_nan_and_what_lies_beyond_the_image(target):
    """As in the reduction: a NaN of z passes the gradient, and what lies beyond the image does not count."""
    from rir_kernels.triton.launch import batchnorm, conv

    spec, z, weight, dz = _operands(SHAPES["odd sides"], target, rand)
    mean, invstd, gamma, beta = _channels(z, seed=4)
    z[1, 2, 3, 3] = float("nan")
    # beyond the image, where z reads zero, xhat is infinite; within it is zero
    z[:, 3], mean[3], invstd[3], gamma[3] = 29952.0, 29952.0, 1e35, 0.0
    norm = {"mean": mean, "invstd": invstd, "gamma": gamma, "beta": beta}
    dx, partial = conv.conv_data_grad(
        dz, weight, shape=tuple(z.shape), spec=spec, upstream=batchnorm.Upstream(z, **norm, relu=True)
    )
    sums = batchnorm.bn_sum(partial, 1.0)
    theirs = batchnorm.bn_reduce(dx, z, None, **norm, spec=ConvBNActSpec())
    for ours, golden in zip(sums, theirs, strict=True):
        torch.testing.assert_close(ours, golden, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert sums[0].isfinite().all() and sums[1].isnan().tolist() == [channel == 2 for channel in range(24)]


@targets
def test_where_they_are_not_computed(target):
    """Rows that no descriptor reads, strides of two, no pixels, large tiles: reducing is left to the layer upstream."""
    from rir_kernels.triton.launch import batchnorm, conv

    for c_in, stride, n in ((5, 1, 2), (8, 2, 2), (8, 1, 0)):
        spec = ConvBNActSpec((stride, stride), (1, 1))
        z, weight = rand((n, c_in, 4, 4), target, seed=1), rand((8, c_in, 3, 3), target, seed=2)
        dz = rand(spec.output_shape(z, weight), target, seed=3)
        upstream = batchnorm.Upstream(z, *_channels(z, seed=4), relu=True)
        dx, partial = conv.conv_data_grad(dz, weight, shape=tuple(z.shape), spec=spec, upstream=upstream)
        assert partial is None
        assert torch.equal(dx, conv.conv_data_grad(dz, weight, shape=tuple(z.shape), spec=spec)[0])
    large = ConvConfig((4, 8, 8), 64, 32, num_warps=8, num_stages=2, groups=3)  # 192 sums
    # in 16 bits z has room beside them, but on Triton 3.8
    assert holds_upstream(large, 2) == (triton_release() != (3, 8)) and not holds_upstream(large, 4)
    folded = ConvConfig((2, 16, 16), 32, 32, num_warps=8, num_stages=2, fold=True)
    assert holds_upstream(folded, 2) and not holds_upstream(folded._replace(num_warps=4), 2)
    spec = ConvBNActSpec(padding=(1, 1))
    z, weight = rand((1, 8, 4, 4), target, seed=1), rand((8, 8, 3, 3), target, seed=2)
    upstream = batchnorm.Upstream(z, *_channels(z, seed=4), relu=True)
    with use_tile(large._replace(num_warps=4)):
        assert conv.conv_data_grad(z, weight, shape=tuple(z.shape), spec=spec, upstream=upstream)[1] is None


@pytest.mark.parametrize("impl", ["triton", "hybrid"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_two_layers_by_way_of_each_other(target, impl, training):
    """The second layer's backward hands its sums to the first, whose gradients are those of its own reduction."""
    from rir_kernels.triton.launch import batchnorm

    first, second = ConvBNActSpec(padding=(1, 1)), ConvBNActSpec(padding=(1, 1), shortcut_channels=8)
    x, weight0 = rand((2, 8, 5, 6), target, seed=1), rand((16, 8, 3, 3), target, seed=2, scale=0.1)
    weight1 = rand((8, 16, 3, 3), target, seed=3, scale=0.1)
    z0, z1, dy = (
        rand((2, 16, 5, 6), target, seed=4),
        rand((2, 8, 5, 6), target, seed=5),
        rand((2, 8, 5, 6), target, seed=6),
    )
    norm0, norm1 = _channels(z0, seed=7), _channels(z1, seed=12)
    options = {"training": training, "needs": (True, True, False, True, True, False), "impl": impl}
    upstream = batchnorm.Upstream(z0, *norm0, activation=first.activation)
    y0 = batchnorm.bn_apply(
        z0, batchnorm.Statistics(norm0[0], None, norm0[1]), gamma=norm0[2], beta=norm0[3], residuals=(), spec=first
    )
    alone = fused.backward(dy, y0, weight1, z1, None, *norm1, second, **options)
    *grads, sums = fused.backward(dy, y0, weight1, z1, None, *norm1, second, **options, upstream=upstream)
    assert len(alone) == 6 and all(torch.equal(alone[i], grads[i]) for i in (0, 1, 3, 4))
    assert (sums is None) == (impl == "hybrid")
    golden = fused.backward(grads[0], x, weight0, z0, None, *norm0, first, **options)
    ours = fused.backward(grads[0], x, weight0, z0, None, *norm0, first, **options, sums=sums)
    for name, one, other in zip(("dx", "dweight", "dbias", "dgamma", "dbeta"), ours, golden, strict=False):
        if other is not None:
            assert_close(one, other, target[1], terms=240, name=name)
    if sums is not None:
        changed = fused.backward(
            grads[0], x, weight0, z0, None, *norm0, first, **options, sums=tuple(2 * s for s in sums)
        )
        assert torch.equal(changed[3], 2 * sums[1]) and torch.equal(changed[4], 2 * sums[0])
