"""Codes, scales and bounds: by hand, by exact fractions and by numpy."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch

from models.quantized import codes
from models.quantized.quantizer import Quantizer
from rir_kernels.common.spec import ConvBNActSpec
from tests.support import quantized_helpers as oracle

NAN, INF = float("nan"), float("inf")


def test_codes_by_hand():
    """Every number worked out on paper; 0.3 is not exact in binary, and far from where a floor jumps."""
    weight = torch.tensor([[0.5, -1.0, 0.25, -0.5], [0.0, 0.0, 0.0, 0.0], [3.5, -0.25, 0.74, 0.76]])
    scale = codes.weight_scale(weight, 4)
    assert scale.tolist() == [7, 7, 2]  # 7 / 1, a channel of zeros as if 7 / 1, 7 / 3.5
    # 3.5 -> 4 and -3.5 -> -3: halves go up
    assert codes.to_codes(weight, scale, 4, signed=True).tolist() == [[4, -7, 2, -3], [0, 0, 0, 0], [7, 0, 1, 2]]

    two = torch.tensor(2.0)
    x = torch.tensor([0.3, 1.99, 2.0, 5.0, 0.0, -0.1, INF])
    assert codes.scale_of(two, 4, signed=False) == 8
    assert codes.to_codes(x, torch.tensor(8.0), 4, signed=False).tolist() == [2, 15, 15, 15, 0, 0, 15]
    x = torch.tensor([0.3, -2.0, 2.2, -2.2, 1.0, -INF])
    assert codes.scale_of(two, 4, signed=True) == 3.5
    assert codes.to_codes(x, torch.tensor(3.5), 4, signed=True).tolist() == [1, -7, 7, -7, 4, -7]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_those_of_exact_fractions(bits, signed):
    """A bound with which the scale is 4, and numbers with few bits: nothing is rounded, so every code must be right."""
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    bound = torch.tensor((high if signed else 2**bits) / 4)
    x = torch.arange(-300, 301) * 2.0**-3 * bound / 32  # steps of less than a code, and beyond the range
    scale = codes.scale_of(bound, bits, signed)
    assert scale == 4
    exact = [floor(Fraction(v) * 4 + (Fraction(1, 2) if signed else 0)) for v in x.tolist()]
    expected = [min(max(q, -high if signed else 0), high) for q in exact]
    assert codes.to_codes(x, scale, bits, signed=signed).tolist() == expected
    assert min(expected) == (-high if signed else 0) and max(expected) == high


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_numpys(bits, dtype):
    torch.manual_seed(bits)
    weight = torch.randn(9, 5, 3, 3, dtype=dtype)
    scale = codes.weight_scale(weight, bits)
    np.testing.assert_array_equal(scale.numpy(), oracle.numpy_weight_scale(weight, bits))
    np.testing.assert_array_equal(
        codes.to_codes(weight, scale, bits, signed=True), oracle.numpy_codes(weight, scale, bits, True)
    )
    for signed in (True, False):
        bound = torch.rand((), dtype=dtype) + 0.5
        scale = codes.scale_of(bound, bits, signed)
        np.testing.assert_array_equal(scale.numpy(), oracle.numpy_activation_scale(bound, bits, signed))
        np.testing.assert_array_equal(
            codes.to_codes(weight, scale, bits, signed=signed), oracle.numpy_codes(weight, scale, bits, signed)
        )


def test_gradients_are_straight_through_and_zero_outside():
    x = torch.tensor([-0.1, 0.0, 0.3, 1.99, 2.0, 5.0, NAN], requires_grad=True)
    (grad,) = torch.autograd.grad(codes.to_codes(x, torch.tensor(8.0), 4, signed=False).sum(), x)
    assert grad.tolist() == [0, 8, 8, 8, 0, 0, 0]  # 1.99 s is 15 after floor, 2.0 s is 16: clipped
    x = torch.tensor([-2.2, -2.1, 0.0, 2.1, 2.2], requires_grad=True)
    (grad,) = torch.autograd.grad(codes.to_codes(x, torch.tensor(3.5), 4, signed=True).sum(), x)
    assert grad.tolist() == [0, 3.5, 3.5, 3.5, 0]  # 2.1 s + 1/2 = 7.85, 2.2 s + 1/2 = 8.2


@pytest.mark.parametrize("bound", [0.0, 1e-45, 1e-38])
def test_a_bound_of_nothing_counts_as_one(bound):
    """Below 1e-36 the scale would overflow, and 0 * inf is no code."""
    scale = codes.scale_of(torch.tensor(bound), 8, signed=False)
    assert scale == 256
    assert codes.to_codes(torch.tensor([0.0, 1e-38]), scale, 8, signed=False).tolist() == [0, 0]


def test_nan_stays_nan():
    weight = torch.tensor([[1.0, NAN], [1.0, 2.0]])
    scale = codes.weight_scale(weight, 4)
    assert scale.isnan().tolist() == [True, False]
    assert codes.to_codes(weight, scale, 4, signed=True).isnan().tolist() == [[True, True], [False, False]]
    assert codes.scale_of(torch.tensor(NAN), 4, signed=False).isnan()
    bound = codes.next_bound(torch.tensor(1.0), torch.tensor([2.0, NAN]), signed=True, first=torch.tensor(False))
    assert bound.isnan()


def test_the_bound_is_a_running_mean_of_the_largest():
    quantizer = Quantizer(4, 4, signed=False)
    weight, spec = torch.ones(1, 1, 1, 1), ConvBNActSpec()
    for values, expected in (([1.0, -8.0], 1.0), ([3.0, 0.0], 1.2), ([0.2, 0.1], 1.1)):
        quantizer(torch.tensor(values).view(1, 1, 1, 2), weight, spec)
        assert quantizer.bound.item() == pytest.approx(expected, rel=1e-6)  # one fp32 rounding or two
    quantizer.eval()(torch.full((1, 1, 1, 1), 50.0), weight, spec)
    assert quantizer.bound.item() == pytest.approx(1.1, rel=1e-6) and quantizer.batches == 3
    signed = Quantizer(4, 4, signed=True)
    signed(torch.tensor([1.0, -8.0]).view(1, 1, 1, 2), weight, spec)
    assert signed.bound == 8


def test_activations_are_float_before_the_start_step():
    torch.manual_seed(0)
    quantizer = Quantizer(None, 3, start_step=2)
    x, weight, spec = torch.rand(1, 1, 4, 4), torch.ones(1, 1, 1, 1), ConvBNActSpec()
    assert torch.equal(quantizer.eval()(x, weight, spec), x)
    quantizer.train()
    assert [torch.equal(quantizer(x, weight, spec), x) for _ in range(4)] == [True, True, False, False]
    twin = Quantizer(None, 3, start_step=2)
    twin.load_state_dict(quantizer.state_dict())
    assert torch.equal(twin.eval()(x, weight, spec), quantizer.eval()(x, weight, spec))
    twin.load_state_dict(Quantizer().state_dict())  # back to no batches
    assert torch.equal(twin(x, weight, spec), x)
