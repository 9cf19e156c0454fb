"""The normalization kernels against their formulas in fp64."""

from dataclasses import replace

import pytest
import torch

from rir_kernels.common.activations import activate
from rir_kernels.common.spec import ConvBNActSpec

from .targets import TARGETS, assert_close, ieee_fp32, rand, small_integers  # noqa: F401 (an autouse fixture)

pytestmark = pytest.mark.usefixtures("poisoned")
targets = pytest.mark.parametrize("target", TARGETS)
SHAPES = [(2, 8, 5, 5), (3, 5, 7, 3), (2, 96, 4, 4), (1, 33, 1, 9), (700, 3, 3, 3), (2, 130, 2, 2)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def _channels(values):
    return values[None, :, None, None]


def _moments(z):
    z = z.double()
    return z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)


def _statistics(z, eps=1e-5):
    from rir_kernels.triton.launch import batchnorm

    return batchnorm.bn_finalize(batchnorm.bn_stats(z), eps)


@shapes
@targets
def test_statistics(shape, target):
    z = rand(shape, target, seed=1)
    statistics = _statistics(z)
    mean, var = _moments(z)
    terms = z[:, 0].numel()
    # the mean may be close to zero: its error is measured against the deviation
    assert ((statistics.mean.double() - mean).abs() <= 4 * terms**0.5 * 6e-8 * var.sqrt()).all()
    assert_close(statistics.var, var, torch.float32, terms=terms, name="var")
    assert_close(statistics.invstd, torch.rsqrt(var + 1e-5), torch.float32, terms=terms, name="invstd")


@targets
@pytest.mark.parametrize("stride", [1, 2])
def test_statistics_of_the_convolutions_epilogue(target, stride):
    """Tiles that hang over the image count their true pixels: 3 x 9 x 17 pixels leave every kind of partial tile.

    Lanes beyond the image hold sums of the convolution, and with a bias the bias too.
    """
    from rir_kernels.triton.launch import batchnorm, conv

    spec = ConvBNActSpec(stride=(stride, stride), padding=(1, 1))
    x, weight = rand((3, 8, 9, 17), target, seed=1), rand((24, 8, 3, 3), target, seed=2)
    bias = rand((24,), target, seed=3) if stride == 2 else None
    z, moments = conv.conv_train(x, weight, bias=bias, residuals=(), spec=spec)
    pixels = z[:, 0].numel()
    assert moments.count.sum().item() == pixels
    golden_bias = None if bias is None else bias.double()
    golden = torch.nn.functional.conv2d(x.double(), weight.double(), golden_bias, stride, 1)
    mean, var = _moments(golden)
    statistics = batchnorm.bn_finalize(moments, 1e-5)
    assert ((statistics.mean.double() - mean).abs() <= 4 * pixels**0.5 * 6e-8 * var.sqrt()).all()
    assert_close(statistics.var, var, torch.float32, terms=pixels, name="var")


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0][1] == torch.float32])
def test_merge_of_many_tiles(target):
    """More tiles than are merged at a time, of unequal counts; the running statistics in fp32 and in half precision."""
    from rir_kernels.triton.launch import batchnorm

    device = target[0]
    tiles, channels, momentum = 5000, 9, 0.3
    counts = torch.randint(1, 5, (tiles,), generator=torch.Generator().manual_seed(1))
    values = rand((int(counts.sum()), channels), (torch.device("cpu"), torch.float64), seed=2) + 3
    parts = values.split(counts.tolist())
    mean, m2 = (
        torch.stack([f(part) for part in parts]).float().to(device)
        for f in (lambda part: part.mean(0), lambda part: ((part - part.mean(0)) ** 2).sum(0))
    )
    moments = batchnorm.TileMoments(mean, m2, counts.float().to(device))
    for dtype in (torch.float32, torch.float16):
        running = [torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)]
        batches = torch.tensor(7, device=device)
        statistics = batchnorm.bn_finalize(
            moments, 1e-5, running_mean=running[0], running_var=running[1], batches=batches, momentum=momentum
        )
        golden = values.mean(0).to(device), values.var(0, unbiased=False).to(device)
        # sums of some thousand numbers near four, in fp32
        torch.testing.assert_close(statistics.mean.double(), golden[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(statistics.var.double(), golden[1], rtol=1e-5, atol=0)
        expected = momentum * golden[0], 1 - momentum + momentum * values.var(0).to(device)
        for ours, exact in zip(running, expected, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5 if dtype == torch.float32 else 2**-11, atol=0)
        assert batches == 8


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0][1] == torch.float32])
@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_large_mean_small_deviation(target, ratio):
    """E[x^2] - E[x]^2 would lose every digit here: fp32 holds 7, and mean^2 / var takes 6 or 8 of them."""
    z = rand((64, 5, 6, 6), target, seed=1) + ratio
    statistics = _statistics(z)
    mean, var = _moments(z)
    # a tile's sum is some 64 * ratio: a few of its roundings, divided by 64, are left in the mean
    assert ((statistics.mean.double() - mean).abs() <= 4 * torch.finfo(torch.float32).eps * ratio).all()
    assert ((statistics.var.double() - var).abs() <= 1e-3 * var).all()


def _layer_formula(z, mean, var, gamma, beta, residuals, spec):
    xhat = (z - _channels(mean)) * torch.rsqrt(_channels(var) + spec.eps)
    u = spec.norm_scale * (_channels(gamma) * xhat + _channels(beta))
    for residual in residuals:
        u = torch.cat([u[:, : residual.shape[1]] + residual, u[:, residual.shape[1] :]], 1)
    return activate(u, spec.activation)


OPTIONS = {
    "relu": ConvBNActSpec(),
    "no relu": ConvBNActSpec(activation=None),
    "residuals after the norm": ConvBNActSpec(post_norm=True, branch_scale=0.7),
}


@shapes
@targets
@pytest.mark.parametrize("spec", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("training", [True, False])
def test_apply_and_backward(shape, target, spec, training):
    """y, then the sums, dz and the residual's gradient, against autograd through the formula in fp64."""
    from rir_kernels.triton.launch import batchnorm

    dtype = target[1]
    c = shape[1]
    z, dy = rand(shape, target, seed=1), rand(shape, target, seed=2)
    gamma, beta = rand((c,), (target[0], torch.float32), seed=3) + 1, rand((c,), (target[0], torch.float32), seed=4)
    residuals = [rand((shape[0], k, *shape[2:]), target, seed=5 + k) for k in (c, max(1, c // 2))]
    residuals = residuals if spec.post_norm else []
    statistics = _statistics(z)
    y = batchnorm.bn_apply(z, statistics, gamma=gamma, beta=beta, residuals=residuals, spec=spec)

    leaves = [t.double().requires_grad_() for t in (z, gamma, beta, *residuals)]
    mean, var = (m if training else m.detach() for m in (leaves[0].mean((0, 2, 3)), leaves[0].var((0, 2, 3), False)))
    golden = _layer_formula(leaves[0], mean, var, leaves[1], leaves[2], leaves[3:], spec)
    # an element whose u is within rounding of zero may fall on either side of the ReLU: leave it out of the gradient
    if spec.activation:
        u = _layer_formula(leaves[0], mean, var, leaves[1], leaves[2], leaves[3:], replace(spec, activation=None))
        dy = dy * (u.abs() > 1e-2)
    dz, dgamma, dbeta, *dresiduals = torch.autograd.grad(golden, leaves, dy.double())
    assert_close(y, golden.detach(), dtype, terms=64, name="y")

    per_channel = {"mean": statistics.mean, "invstd": statistics.invstd, "gamma": gamma, "beta": beta, "spec": spec}
    mask = y if spec.post_norm else None
    sums = batchnorm.bn_reduce(dy, z, mask, **per_channel)
    pixels = z[:, 0].numel()
    # sums cancel: their scale is that of the terms, not of the result
    assert_close(sums[0], dbeta, torch.float32, terms=4 * pixels, name="dbeta")
    assert_close(sums[1], dgamma, torch.float32, terms=4 * pixels, name="dgamma")
    count = pixels if training else None
    ours, dres = batchnorm.bn_apply_grad(dy, z, mask, sums, count=count, **per_channel, need_dres=spec.post_norm)
    assert_close(ours, dz, dtype, terms=4 * pixels, name="dz")
    for golden_residual in dresiduals:
        k = golden_residual.shape[1]
        assert torch.equal(dres[:, :k].double(), golden_residual)


@targets
def test_channel_slices_are_read_in_place_or_copied(target):
    """dy and residuals may be slices of wider tensors, expanded, or in the other memory format."""
    from rir_kernels.triton.launch import batchnorm

    spec = ConvBNActSpec(post_norm=True, activation=None)
    z = small_integers((2, 8, 4, 4), target, seed=1)
    identity = batchnorm.Statistics(*(torch.full((8,), v, device=target[0]) for v in (0.0, 1.0, 1.0)))
    wide = small_integers((2, 24, 4, 4), target, seed=2)
    assert batchnorm.evenly_spaced(wide[:, 8:16]).data_ptr() == wide[:, 8:16].data_ptr()
    for residual in (
        wide[:, 3:9],
        wide[:, 8:16],
        small_integers((2, 28, 4, 4), target, seed=3)[:, :8],  # pixels 56 bytes apart in 16 bits: no multiple of 16
        wide[:1, :8].expand(2, 8, 4, 4),
        wide[:, :5].contiguous(),
        wide[:, :8].mT,
    ):
        y = batchnorm.bn_apply(z, identity, gamma=None, beta=None, residuals=[residual], spec=spec)
        golden = z.clone()
        golden[:, : residual.shape[1]] += residual
        assert torch.equal(y, golden)
        dy = torch.zeros_like(z)
        dy[:, : residual.shape[1]] = residual
        even = batchnorm.evenly_spaced(dy if residual.shape[1] < 8 else residual)
        sums = batchnorm.bn_reduce(
            even, z, None, mean=identity.mean, invstd=identity.invstd, gamma=None, beta=None, spec=spec
        )
        assert torch.equal(sums[0], dy.float().sum((0, 2, 3)))
        assert torch.equal(sums[1], (dy * z).float().sum((0, 2, 3)))


@targets
def test_programs_of_several_steps(target, monkeypatch):
    """Small blocks of rows, three to a program, the last program's beyond the end: as for tensors a thousand times it.

    The mean moves from block to block, so that merging them is most of the variance.
    """
    from rir_kernels.triton.launch import batchnorm
    from rir_kernels.triton.tiling.conv_tiles import RowsConfig

    monkeypatch.setattr(batchnorm, "rows_config", lambda m, c: RowsConfig(4, 8, 3, 4))
    z = rand((5, 8, 3, 3), target, seed=1) + torch.arange(5, device=target[0]).to(target[1])[:, None, None, None]
    statistics = _statistics(z)
    mean, var = _moments(z)
    assert_close(statistics.mean, mean, torch.float32, terms=45, name="mean")
    assert_close(statistics.var, var, torch.float32, terms=45, name="var")

    dy, spec = rand((5, 8, 3, 3), target, seed=2), ConvBNActSpec(activation=None)
    per_channel = {"mean": statistics.mean, "invstd": statistics.invstd, "gamma": None, "beta": None, "spec": spec}
    sums = batchnorm.bn_reduce(dy, z, None, **per_channel)
    xhat = (z.double() - _channels(mean)) * _channels(torch.rsqrt(var + 1e-5))
    assert_close(sums[0], dy.double().sum((0, 2, 3)), torch.float32, terms=4 * 45, name="dbeta")
    assert_close(sums[1], (dy.double() * xhat).sum((0, 2, 3)), torch.float32, terms=4 * 45, name="dgamma")


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0][1] == torch.float32])
@pytest.mark.parametrize("splits", [1, 512, 1100])
def test_sum_of_many_splits(target, splits):
    """More than are added at a time, to the bit: integers."""
    from rir_kernels.triton.launch import batchnorm

    partial = small_integers((splits, 2, 9, 1), target, seed=1)[..., 0].contiguous()
    for ours, which in zip(batchnorm.bn_sum(partial, 2.0), partial.unbind(1), strict=True):
        assert torch.equal(ours, 2 * which.sum(0))


@targets
def test_the_relus_gradient_at_zero_and_at_a_nan(target):
    """As torch's: none where the ReLU's input is zero, and a NaN passes it."""
    from rir_kernels.triton.launch import batchnorm

    z = torch.tensor([-1.0, 0.0, 1.0, float("nan")], device=target[0], dtype=target[1]).view(4, 1, 1, 1)
    z = z.expand(4, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    dy, spec = torch.full_like(z, 3.0), ConvBNActSpec(post_norm=True)
    zeros, ones = torch.zeros(8, device=target[0]), torch.ones(8, device=target[0])
    per_channel = {"mean": zeros, "invstd": ones, "gamma": None, "beta": None, "spec": spec}
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(leaf.relu(), leaf, dy)
    for mask in (None, z):  # told by z, and by a sum after the norm
        dz, dres = batchnorm.bn_apply_grad(dy, z, mask, None, count=None, **per_channel, need_dres=True)
        assert torch.equal(dz, expected) and torch.equal(dres, expected)
