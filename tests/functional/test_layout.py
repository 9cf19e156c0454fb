"""Memory formats: what goes in in one comes out in it, and no way of lying in memory changes the numbers."""

import pytest
import torch
import torch.nn.functional as F

import rir_kernels as rir
from rir_kernels.common.memory_format import to_format
from tests.support.helpers import formula

conv_bn_act = rir.functional.conv_bn_act
LAST = torch.channels_last
# fp64, numbers of order one out of a few dozen terms: rounding stays below 1e-13, a mistake is above 1e-3
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def randn(*shape, memory_format=torch.contiguous_format):
    # empty(), as .to() would leave the strides of a tensor that fits both formats
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.empty(shape, dtype=torch.float64, memory_format=memory_format).copy_(values)


# how the input lies in memory: each of shape (N, 3, H, W), or with one channel
INPUTS = {
    "contiguous": lambda: randn(2, 3, 5, 6),
    "channels_last": lambda: randn(2, 3, 5, 6, memory_format=LAST),
    "one image": lambda: randn(1, 3, 5, 6, memory_format=LAST),
    "slice of channels": lambda: randn(2, 7, 5, 6)[:, 2:5],
    "slice of channels, channels_last": lambda: randn(2, 7, 5, 6, memory_format=LAST)[:, 2:5],
    "unaligned": lambda: randn(2 * 3 * 5 * 6 + 1, 1, 1, 1).flatten()[1:].view(2, 3, 5, 6),
    "every other pixel": lambda: randn(2, 3, 10, 12)[:, :, ::2, ::2],
    "transposed": lambda: randn(2, 3, 6, 5).transpose(2, 3),
    "transposed channels_last": lambda: randn(2, 3, 6, 5, memory_format=LAST).transpose(2, 3),
    "expanded batch": lambda: randn(1, 3, 5, 6).expand(2, -1, -1, -1),
    "expanded channels": lambda: randn(2, 1, 5, 6).expand(-1, 3, -1, -1),
    "expanded pixels": lambda: randn(2, 3, 1, 1).expand(-1, -1, 5, 6),
    # what fits both formats: the strides tell
    "one channel": lambda: randn(2, 1, 5, 6),
    "one channel, channels_last": lambda: randn(2, 1, 5, 6, memory_format=LAST),
    "one channel out of three": lambda: randn(2, 3, 5, 6)[:, :1],
    "one channel out of three, channels_last": lambda: randn(2, 3, 5, 6, memory_format=LAST)[:, :1],
    "one pixel": lambda: randn(4, 3, 1, 1),
    "one pixel, channels_last": lambda: randn(4, 3, 1, 1, memory_format=LAST),
    "one pixel and channel": lambda: randn(4, 1, 1, 1, memory_format=LAST),
    "one column": lambda: randn(2, 3, 5, 1),
    "one column, channels_last": lambda: randn(2, 3, 5, 1, memory_format=LAST),
    "one row, channels_last": lambda: randn(2, 3, 1, 5, memory_format=LAST),
    "empty": lambda: randn(0, 3, 5, 6),
    "empty, channels_last": lambda: randn(0, 3, 5, 6, memory_format=LAST),
}
inputs = pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())


@inputs
@pytest.mark.parametrize("c_out", [4, 1])
@pytest.mark.parametrize("kernel", [3, 1])
def test_the_format_and_the_strides_are_those_of_torchs_convolution(make, c_out, kernel):
    x = make()
    weight = randn(c_out, x.shape[1], kernel, kernel)  # contiguous: torch also asks the weight, we do not
    expected = F.conv2d(x, weight, padding=kernel // 2)
    for impl in ("torch", "reference"):
        y = conv_bn_act(x, weight, padding=kernel // 2, training=True, impl=impl)
        assert y.stride() == expected.stride()
        if x.shape[0]:  # the formula does not know torch's rule for empty batches
            torch.testing.assert_close(y, formula(x, weight, padding=kernel // 2, training=True), **CLOSE)


def test_the_weights_format_does_not_count():
    weight = randn(4, 3, 3, 3, memory_format=LAST)
    for x, memory_format in (
        (randn(2, 3, 5, 6), torch.contiguous_format),
        (randn(2, 3, 5, 6, memory_format=LAST), LAST),
    ):
        y = conv_bn_act(x, weight, training=True)
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, formula(x, weight, training=True), **CLOSE)


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 1, 5, 6), (2, 3, 1, 1), (2, 3, 5, 1), (1, 3, 5, 6)])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_to_format_is_seen_in_the_strides(shape, given, wanted):
    """Also where both formats fit, as behind kernels that write one format only: the next layer must read it right."""
    formats = {True: LAST, False: torch.contiguous_format}
    x = randn(*shape, memory_format=formats[given])
    y = to_format(x, wanted)
    assert y.stride() == randn(*shape, memory_format=formats[wanted]).stride()
    assert torch.equal(x, y)
    assert (y is x) == (given == wanted)


RESIDUALS = {
    "channels_last": lambda: randn(2, 4, 5, 6, memory_format=LAST),
    "slice": lambda: randn(2, 9, 5, 6)[:, 3:6],
    "slice, channels_last": lambda: randn(2, 9, 5, 6, memory_format=LAST)[:, 3:6],
    "every other pixel": lambda: randn(2, 2, 10, 12)[:, :, ::2, ::2],
    "transposed": lambda: randn(2, 4, 6, 5).transpose(2, 3),
    "expanded": lambda: randn(1, 1, 1, 1).expand(2, 3, 5, 6),
}


@pytest.mark.parametrize("make", RESIDUALS.values(), ids=RESIDUALS.keys())
@pytest.mark.parametrize("residual_at", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_residuals_may_lie_otherwise(make, residual_at, memory_format):
    x, weight, residual = randn(2, 3, 5, 6, memory_format=memory_format), randn(4, 3, 3, 3), make()
    options = {"residual": residual, "residual_at": residual_at, "padding": 1, "training": True}
    for impl in ("torch", "reference"):
        y = conv_bn_act(x, weight, **options, impl=impl)
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, formula(x, weight, **options), **CLOSE)
