"""Bad shapes and statistics, and sizes that are odd but right.

The number in a test's name is a kind of bad input: 6 and 7 shapes, 8 and 9 odd sizes, 11 one value per channel, 21 eps,
22 momentum, 24 missing statistics. Empty batches (10) are in test_functional.py, norms without parameters or statistics
(23) in test_module_state.py.
"""

import math

import pytest
import torch
from torch import nn

import rir_kernels as rir
from rir_kernels import reference
from tests.helpers import assert_within_budget, formula, make_call, output_gradient, run
from tests.refusals import call_arguments, call_refused, module_refused, refused

conv_bn_act = rir.functional.conv_bn_act


@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("shape", [(), (6,), (4, 7, 6), (1, 3, 4, 7, 6)], ids=str)
def test_row_06_dimensions(name, shape):
    call_refused(ValueError, f"{name} must have four dimensions", str(shape), **{name: torch.zeros(shape)})
    for module in (rir.RiRLayer(4, 6), rir.RiRLayer(4, 6, shortcut="projection"), rir.RiRBlock(4, 6)):
        module_refused(module, ValueError, "x must have", "(N, ", str(shape), inputs=[torch.zeros(shape)])


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"x": (3, 5, 7, 6)}, ["x has 5 channels", "(6, 4, 3, 3)", "takes 4"]),
        ({"groups": 2}, ["x has 4 channels", "groups=2", "takes 8"]),
        ({"groups": 4}, ["6 output channels", "groups=4"]),
        ({"weight": (0, 4, 3, 3)}, ["weight must have no empty dimension", "(0, 4, 3, 3)"]),
        ({"weight": (6, 4, 0, 3)}, ["weight must have no empty dimension", "(6, 4, 0, 3)"]),
        ({"x": (3, 4, 0, 6)}, ["x must have no empty dimension", "(3, 4, 0, 6)"]),
        ({"x": (3, 4, 7, 6), "dilation": 5}, ["the output would be -1 x -2 pixels", "dilation (5, 5)"]),
        ({"bias": (5,)}, ["bias must have the shape (6,)", "got (5,)"]),
        ({"bias": (6, 1)}, ["bias must have the shape (6,)", "got (6, 1)"]),
        ({"bn_weight": (5,)}, ["bn_weight must have the shape (6,)", "got (5,)"]),
        ({"bn_bias": ()}, ["bn_bias must have the shape (6,)", "got ()"]),
        ({"running_mean": (1, 6)}, ["running_mean must have the shape (6,)", "got (1, 6)"]),
        ({"running_var": (1,)}, ["running_var must have the shape (6,)", "got (1,)"]),
        ({"residual": (3, 7, 7, 6)}, ["residual must have the shape (3, C_res, 7, 6)", "C_res <= 6", "(3, 7, 7, 6)"]),
        ({"residual": (1, 4, 7, 6)}, ["residual must have the shape", "(1, 4, 7, 6)"]),  # no broadcasting
        ({"residual": (3, 4, 1, 1)}, ["residual must have the shape", "(3, 4, 1, 1)"]),
        ({"residual": (4, 7, 6)}, ["residual must have the shape", "(4, 7, 6)"]),
    ],
)
def test_row_07_shapes(change, fragments):
    change = {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in change.items()}
    call_refused(ValueError, *fragments, **change)


@pytest.mark.parametrize("make", [rir.RiRLayer, rir.RiRBlock])
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_row_07_shapes_of_the_streams(make, shortcut):
    module, zeros = make(4, 6, shortcut=shortcut), torch.zeros
    module_refused(
        module,
        ValueError,
        "4",
        "got (2, 5, 3, 3)" if make is rir.RiRBlock or shortcut == "projection" else "x has 5 channels",
        inputs=[zeros(2, 5, 3, 3)],
    )
    module_refused(module, ValueError, "r must have", "got (2, 3, 3, 3)", inputs=[zeros(2, 3, 3, 3), zeros(2, 2, 3, 3)])
    module_refused(module, ValueError, "t must have", "got (2, 3, 3, 3)", inputs=[zeros(2, 2, 3, 3), zeros(2, 3, 3, 3)])
    for other in ((1, 2, 3, 3), (2, 2, 3, 4)):
        module_refused(module, ValueError, "r and t must agree", str(other), inputs=[zeros(2, 2, 3, 3), zeros(other)])
    module_refused(module, ValueError, "t must have the shape (N, 2, H, W)", inputs=[zeros(2, 2, 3, 3), None])
    module_refused(module, ValueError, "r and t are both None", inputs=[None, None])


def test_row_07_outer():
    layer, x = rir.RiRLayer(4, 6), torch.randn(2, 4, 5, 5)
    for shape in ((2, 7, 5, 5), (2, 6, 4, 5), (6,)):
        with refused(ValueError, "C_res <= 6", str(shape), leaves_alone=[*layer.parameters(), *layer.buffers()]):
            layer(x, outer=torch.zeros(shape))


@pytest.mark.parametrize("channels", [1, 3, 13, 15, 17, 31, 33, 2049])
def test_row_08_channels(channels):
    tensors, options = make_call(
        channels=(channels, channels), kernel=1, batch=2, size=(3, 3), dtype=torch.float32, training=True,
        residuals=(channels,),
    )  # fmt: skip
    dy = output_gradient(tensors, options, margin=1e-3)  # fp32 sums of 2049 products: errors near 1e-5
    golden = run(formula, tensors, options, dy, dtype=torch.float64)
    torchs = run(reference.conv_bn_act, tensors, options, dy)
    assert_within_budget(run(conv_bn_act, tensors, options, dy), torchs, golden, torch.float32)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 8)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_row_09_sizes(size, memory_format):
    tensors, options = make_call(size=size, batch=4, padding=1, stride=2, dtype=torch.float32, training=True)
    golden = run(formula, tensors, options, dtype=torch.float64)
    tensors["x"] = torch.empty(tensors["x"].shape, memory_format=memory_format).copy_(tensors["x"])
    torchs = run(reference.conv_bn_act, tensors, options)
    ours = run(conv_bn_act, tensors, options)
    assert_within_budget(ours, torchs, golden, torch.float32)
    assert ours["y"].is_contiguous(memory_format=memory_format)


def test_row_11_one_value_per_channel():
    """In torch's words, which the norm says after the convolution; we say them before it."""
    message = "Expected more than 1 value per channel when training, got input size"
    with pytest.raises(ValueError, match=message):
        nn.BatchNorm2d(6)(torch.zeros(1, 6, 1, 1))
    for impl in ("auto", "reference", "torch"):
        call_refused(ValueError, f"{message} (1, 6, 1, 1)", x=torch.randn(1, 4, 1, 1), residual=None, impl=impl)
    x = torch.randn(1, 4, 2, 2)
    for module in (
        rir.RiRLayer(4, 6, stride=2),
        rir.RiRBlock(4, 6, stride=2, shortcut="projection"),
        rir.ConvBNAct(4, 6, 3, stride=2),
    ):
        module_refused(module, ValueError, message, inputs=[x])
        assert module.eval()(x).shape == (1, 6, 1, 1)


@pytest.mark.parametrize("eps", [0, 0.0, -1e-5, math.nan, math.inf, "1e-5", None, True])
def test_row_21_eps(eps):
    message = f"eps must be a positive number, got {eps!r}"
    for training in (True, False):
        call_refused(ValueError, message, eps=eps, training=training)
    for make in (lambda: rir.RiRLayer(4, 6, eps=eps), lambda: rir.ConvBNAct(4, 6, 3, eps=eps)):
        with pytest.raises(ValueError, match=r"eps must be a positive number"):
            make()
    for module in (rir.RiRLayer(4, 6), rir.ConvBNAct(4, 6, 3)):
        module.bn.eps = eps  # read at every call
        module_refused(module, ValueError, message, inputs=[torch.randn(2, 4, 5, 5)])


def test_row_22_momentum():
    """Numbers are not limited, as in torch. The cumulative average needs the count of batches, which a module has."""
    for momentum in (None, "0.1", True):
        call_refused(TypeError, f"momentum must be a number, got {momentum!r}", momentum=momentum)
    with pytest.raises(ValueError, match="momentum must be a number, or None"):
        rir.RiRLayer(4, 6, momentum="0.1")


@pytest.mark.parametrize("missing", [["running_mean", "running_var"], ["running_mean"], ["running_var"]])
def test_row_24_evaluation_without_statistics(missing):
    given = call_arguments() | dict.fromkeys(missing)
    with pytest.raises(RuntimeError) as torchs:
        nn.functional.batch_norm(torch.zeros(2, 6, 3, 3), given["running_mean"], given["running_var"], training=False)
    call_refused(RuntimeError, str(torchs.value), training=False, **dict.fromkeys(missing))
    if len(missing) == 1:
        call_refused(ValueError, "must either both be None or neither be None", **dict.fromkeys(missing))
