"""The convolution kernels against torch's convolution in fp64, and bit for bit on integers."""

import pytest
import torch
import torch.nn.functional as F

from rir_kernels.common.spec import ConvBNActSpec
from tests.support.emulation import gpu

from .targets import TARGETS, assert_close, crossed, ieee_fp32, rand, small_integers  # noqa: F401 (an autouse fixture)

pytestmark = pytest.mark.usefixtures("poisoned")

# (N, C_in, C_out, H, W, kernel, stride, padding): every class of tile, mask, parity and channel padding
CASES = {
    "many images": (40, 8, 8, 2, 2, (3, 3), (1, 1), (1, 1)),
    "3x3": (2, 8, 16, 6, 6, (3, 3), (1, 1), (1, 1)),
    "3x3 valid": (2, 8, 8, 5, 7, (3, 3), (1, 1), (0, 0)),
    "3x3 wide padding": (1, 8, 8, 3, 3, (3, 3), (1, 1), (2, 2)),
    "3x3 several pixel tiles": (2, 8, 8, 9, 17, (3, 3), (1, 1), (1, 1)),
    "3x3 several channel tiles": (1, 40, 136, 3, 3, (3, 3), (1, 1), (1, 1)),
    "odd channels": (2, 5, 33, 4, 5, (3, 3), (1, 1), (1, 1)),
    "one channel": (2, 1, 1, 5, 5, (3, 3), (1, 1), (1, 1)),
    "3x3 stride 2": (2, 8, 16, 6, 8, (3, 3), (2, 2), (1, 1)),
    "3x3 stride 2 odd": (2, 16, 8, 7, 5, (3, 3), (2, 2), (1, 1)),
    "3x3 stride 2 valid": (2, 8, 8, 7, 6, (3, 3), (2, 2), (0, 0)),
    "3x3 stride (2, 1)": (2, 8, 8, 6, 5, (3, 3), (2, 1), (1, 1)),
    "3x3 stride 2 one pixel": (3, 8, 8, 1, 1, (3, 3), (2, 2), (1, 1)),
    "3x3 stride 2 one row": (3, 8, 8, 1, 6, (3, 3), (2, 2), (1, 1)),
    "3x3 stride 2 one column": (3, 8, 8, 6, 1, (3, 3), (2, 2), (1, 1)),
    "1x1": (2, 24, 8, 5, 4, (1, 1), (1, 1), (0, 0)),
    "1x1 stride 2": (2, 16, 24, 5, 6, (1, 1), (2, 2), (0, 0)),
    "1x1 stride 2 odd channels": (2, 6, 10, 5, 6, (1, 1), (2, 2), (0, 0)),
    "1x3": (2, 8, 8, 4, 6, (1, 3), (1, 1), (0, 1)),
    "3x1 stride (1, 2)": (2, 8, 8, 4, 6, (3, 1), (1, 2), (1, 0)),
}
cases = crossed(2, case=CASES)
targets = pytest.mark.parametrize("target", TARGETS)


def _operands(case, target, make):
    n, c_in, c_out, h, w, kernel, stride, padding = case
    spec = ConvBNActSpec(stride=stride, padding=padding)
    x = make((n, c_in, h, w), target, seed=1)
    weight = make((c_out, c_in, *kernel), target, seed=2)
    dz = make(spec.output_shape(x, weight), target, seed=3)
    return spec, x, weight, dz


def _golden(spec, x, weight, dz):
    """(z, dx, dw) in fp64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    z = F.conv2d(x, weight, None, spec.stride, spec.padding)
    return z.detach(), *torch.autograd.grad(z, (x, weight), dz.double())


@cases
def test_forward_and_both_gradients(case, target):
    from rir_kernels.triton.launch import conv, wgrad

    spec, x, weight, dz = _operands(case, target, rand)
    z, dx, dw = _golden(spec, x, weight, dz)
    dtype = target[1]
    ours, _ = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
    assert_close(ours, z, dtype, terms=weight[0].numel(), name="z")
    ours, _ = conv.conv_data_grad(dz, weight, shape=tuple(x.shape), spec=spec)
    assert_close(ours, dx, dtype, terms=weight[:, 0].numel(), name="dx")
    ours = wgrad.conv_weight_grad(dz, x, kernel=tuple(weight.shape[2:]), spec=spec)
    assert_close(ours, dw, dtype, terms=dz[:, 0].numel(), name="dw")


@cases
def test_integers_bit_for_bit(case, target):
    """No tolerance: with sparse -1, 0, 1 every sum is exact, so a single wrong tap, mask or channel is seen."""
    from rir_kernels.triton.launch import conv, wgrad

    spec, x, weight, dz = _operands(case, target, small_integers)
    z, dx, dw = _golden(spec, x, weight, dz)
    ours, _ = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
    assert torch.equal(ours.double(), z)
    ours, _ = conv.conv_data_grad(dz, weight, shape=tuple(x.shape), spec=spec)
    assert torch.equal(ours.double(), dx)
    assert torch.equal(wgrad.conv_weight_grad(dz, x, kernel=tuple(weight.shape[2:]), spec=spec).double(), dw)


@targets
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(16, 8, 8), (6, 10, 3), (8, 8, 5)], ids=str)
def test_shortcut_inside_the_kernels(target, stride, channels):
    """The first channels of x, subsampled, join z; backward adds dz to dx in the same place. Exact on integers."""
    from rir_kernels.triton.launch import conv

    c_in, c_out, shortcut = channels
    spec = ConvBNActSpec(stride=(stride, stride), padding=(1, 1), shortcut_channels=shortcut)
    x = small_integers((2, c_in, 5, 6), target, seed=1)
    weight = small_integers((c_out, c_in, 3, 3), target, seed=2)
    z, _ = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
    golden = F.conv2d(x.double(), weight.double(), None, stride, 1)
    golden[:, :shortcut] += x[:, :shortcut, ::stride, ::stride].double()
    assert torch.equal(z.double(), golden)

    dz = small_integers(z.shape, target, seed=3)
    dx, _ = conv.conv_data_grad(dz, weight, shape=tuple(x.shape), spec=spec)
    golden = torch.nn.grad.conv2d_input(x.shape, weight.double(), dz.double(), stride, 1)
    golden[:, :shortcut, ::stride, ::stride] += dz[:, :shortcut].double()
    assert torch.equal(dx.double(), golden)


@targets
def test_epilogue_adds_two_residuals_and_scales_the_branch_alone(target):
    from rir_kernels.triton.launch import conv

    spec = ConvBNActSpec(padding=(1, 1), branch_scale=0.5)
    x, weight = small_integers((2, 8, 4, 4), target, seed=1), small_integers((16, 8, 3, 3), target, seed=2)
    bias = small_integers((16, 1, 1, 1), target, seed=4).flatten()
    residuals = [small_integers((2, c, 4, 4), target, seed=5 + c) for c in (16, 7)]
    z, _ = conv.conv_train(x, weight, bias=bias, residuals=residuals, spec=spec)
    golden = 0.5 * F.conv2d(x.double(), weight.double(), bias.double(), 1, 1)
    for residual in residuals:
        golden[:, : residual.shape[1]] += residual.double()
    assert torch.equal(z.double(), golden)


@targets
def test_slices_and_unaligned_tensors_are_read_right(target):
    """Slices of channels in place, odd offsets, strides of zero and overlapping views by a copy."""
    from rir_kernels.triton.launch import conv, wgrad

    spec = ConvBNActSpec(padding=(1, 1))
    weight = small_integers((8, 8, 3, 3), target, seed=2)
    wide = small_integers((2, 24, 4, 4), target, seed=1)
    flat = small_integers((1, 1, 1, 2 * 8 * 16 + 1), target, seed=7).flatten()
    for x in (
        wide[:, 8:16],
        wide[:, 3:11],
        wide[:, :8].transpose(2, 3),
        wide[:1, :8].expand(3, 8, 4, 4),
        wide[:, :8, ::2, ::2],
        flat[1:].view(2, 4, 4, 8).permute(0, 3, 1, 2),
        flat.as_strided((2, 8, 4, 4), (64, 1, 8, 1)),  # columns overlap, one element apart
        wide[:, :8].contiguous(),
    ):
        z, _ = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
        assert torch.equal(z.double(), F.conv2d(x.double(), weight.double(), None, 1, 1)), x.stride()
        dz = small_integers(z.shape, target, seed=9)
        dw = torch.nn.grad.conv2d_weight(x.double(), weight.shape, dz.double(), 1, 1)
        assert torch.equal(wgrad.conv_weight_grad(dz, x, kernel=(3, 3), spec=spec).double(), dw), x.stride()


@targets
def test_weights_in_every_format(target):
    from rir_kernels.triton.launch import conv

    spec = ConvBNActSpec(padding=(1, 1))
    x, wide = small_integers((2, 8, 4, 4), target, seed=1), small_integers((16, 24, 3, 3), target, seed=2)
    for weight in (wide[:8, :8], wide[:8, 3:11], wide[:8, :8].contiguous(), wide[::2, :8].transpose(2, 3)):
        z, _ = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
        assert torch.equal(z.double(), F.conv2d(x.double(), weight.double(), None, 1, 1)), weight.stride()


@pytest.mark.gpu
def test_tf32_follows_torchs_switch():
    """Rounded operands: 10 bits of mantissa, so beyond fp32's error and within 2^-10 of the sum of magnitudes."""
    from rir_kernels.triton.launch import conv

    target = gpu(), torch.float32
    spec = ConvBNActSpec(padding=(1, 1))
    x, weight = rand((4, 64, 8, 8), target, seed=1), rand((64, 64, 3, 3), target, seed=2)
    golden = F.conv2d(x.double(), weight.double(), None, 1, 1)
    magnitude = F.conv2d(x.double().abs(), weight.double().abs(), None, 1, 1)
    torch.backends.cudnn.allow_tf32 = True
    z, _ = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
    error = (z.double() - golden).abs()
    assert error.max() > 1e-5 and (error <= magnitude * 2**-10).all()
