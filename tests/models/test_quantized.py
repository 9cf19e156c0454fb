"""The quantized layers and their gradients, against torch's autograd on the formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.quantized import layers
from tests.support import quantized_helpers as oracle

NAN = float("nan")


def detached(t, scale, bits, signed):
    """q(t) / s with the gradient of t where nothing was clipped, by the detach trick."""
    shape = [-1, *[1] * (t.dim() - 1)] if scale.ndim else []
    s = torch.as_tensor(scale).reshape(shape)
    q = torch.from_numpy(oracle.numpy_codes(t.detach().numpy(), scale, bits, signed))
    inside = (t.detach() * s + (0.5 if signed else 0)).floor() == q
    passing = t * inside
    return passing + (q / s - passing).detach()


def conv_oracle(quantizer, x, weight, bias=None, **geometry):
    if quantizer.activation_bits is not None:
        bits, signed = quantizer.activation_bits, quantizer.signed
        x = detached(x, oracle.numpy_activation_scale(quantizer.bound.numpy(), bits, signed), bits, signed)
    if quantizer.weight_bits is not None:
        scale = oracle.numpy_weight_scale(weight.detach().numpy(), quantizer.weight_bits)
        weight = detached(weight, scale, quantizer.weight_bits, True)
    return F.conv2d(x, weight, bias, **geometry)


def norm(bn, z):
    mean, var = (None, None) if bn.training else (bn.running_mean, bn.running_var)
    return F.batch_norm(z, mean, var, bn.weight, bn.bias, bn.training, 0.0, bn.eps)


def add_first(z, r):
    return torch.cat([z[:, : r.shape[1]] + r, z[:, r.shape[1] :]], 1)


def layer_oracle(layer, x, outer=None):
    z = conv_oracle(layer.quantizer, x, layer.weight, stride=layer.stride, padding=layer.kernel_size // 2)
    z = z * layer.branch_scale
    r = x[:, : layer.in_residual]
    if layer.projection is not None:
        z = add_first(z, conv_oracle(layer.projection.quantizer, r, layer.projection.weight, stride=layer.stride))
    elif layer.shortcut != "none":
        z = add_first(z, r[:, : layer.out_residual, :: layer.stride, :: layer.stride])
    if outer is not None:
        z = add_first(z, outer)
    return norm(layer.bn, z).relu()


def unit_oracle(unit, x, residual=None):
    conv = unit.conv
    geometry = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
    z = conv_oracle(unit.quantizer, x, conv.weight, conv.bias, **geometry)
    y = norm(unit.bn, z) * unit.branch_scale
    y = y if residual is None else add_first(y, residual)
    return y.relu() if unit.activation else y


LAYERS = {
    "plain": (layers.QuantizedRiRLayer, (4, 4), {}),
    "8 bits": (layers.QuantizedRiRLayer, (4, 6), {"weight_bits": 8, "activation_bits": 8, "signed": True}),
    "2 and 3 bits": (layers.QuantizedRiRLayer, (4, 3), {"weight_bits": 2, "activation_bits": 3, "branch_scale": 0.5}),
    "stride": (layers.QuantizedRiRLayer, (4, 6), {"stride": 2, "residual_fraction": 1.0, "signed": True}),
    "projection": (layers.QuantizedRiRLayer, (4, 6), {"stride": 2, "shortcut": "projection"}),
    "no shortcut": (layers.QuantizedRiRLayer, (4, 6), {"residual_fraction": 0.0, "kernel_size": 1}),
    "float weights": (layers.QuantizedRiRLayer, (4, 6), {"weight_bits": None}),
    "float activations": (layers.QuantizedRiRLayer, (4, 6), {"activation_bits": None}),
    "unit": (layers.QuantizedConvBNAct, (4, 6, 3), {"branch_scale": 0.5}),
    "grouped": (layers.QuantizedConvBNAct, (4, 6, (3, 1)), {"groups": 2, "dilation": 2, "bias": True, "signed": True}),
    "head": (layers.QuantizedConvBNAct, (4, 6, 1), {"activation": None, "weight_bits": 8, "activation_bits": 8}),
}


def leaves_like(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_their_gradients(name, training, channels_last):
    """fp64, numbers of order one: rounding stays below 1e-12, and one wrong code is above 1e-3."""
    torch.manual_seed(1)
    cls, args, options = LAYERS[name]
    module = cls(*args, **options, dtype=torch.float64)
    nn.init.uniform_(module.bn.weight, 0.5, 1.5)
    nn.init.normal_(module.bn.bias)
    module(torch.rand(4, 4, 7, 6, dtype=torch.float64))  # a bound, below what comes next: some of it is clipped
    module.train(training)
    x = leaves_like((3, 4, 7, 6), 2)
    images = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    shape = module.eval()(x).shape if not training else copy.deepcopy(module)(x).shape
    more = leaves_like((3, 2, *shape[2:]), 3)
    if cls is layers.QuantizedRiRLayer:
        y = module(images, outer=more)
        expected = layer_oracle(module, x, outer=more)
    else:
        y = module(images, more)
        expected = unit_oracle(module, x, more)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(y, expected, **close)
    dy = leaves_like(shape, 4).detach()
    leaves = [x, more, *module.parameters()]
    ours, theirs = (torch.autograd.grad(out, leaves, dy) for out in (y, expected))
    for leaf, mine, exact in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact, **close, msg=lambda m, leaf=leaf: f"{tuple(leaf.shape)}: {m}")
    assert training or all(g.abs().max() > 0 for g in ours)


def test_linear():
    torch.manual_seed(0)
    linear = layers.QuantizedLinear(5, 3, weight_bits=8, activation_bits=8, dtype=torch.float64)
    x = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
    y = linear(x)
    q = linear.quantizer
    xq = detached(x, oracle.numpy_activation_scale(q.bound.numpy(), 8, False), 8, False)
    expected = F.linear(xq, detached(linear.weight, oracle.numpy_weight_scale(linear.weight.detach(), 8), 8, True))
    torch.testing.assert_close(y, expected + linear.bias, rtol=1e-12, atol=1e-12)  # fp64, a sum of five
    (dx, dw) = torch.autograd.grad(y.square().sum(), (x, linear.weight))
    (ex, ew) = torch.autograd.grad((expected + linear.bias).square().sum(), (x, linear.weight))
    torch.testing.assert_close(dx, ex, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dw, ew, rtol=1e-11, atol=1e-11)


def test_two_streams_are_the_packed_layer():
    torch.manual_seed(0)
    layer = layers.QuantizedRiRLayer(4, 6)
    x = torch.rand(2, 4, 5, 5)
    layer(x)
    layer.eval()
    y = layer(x)
    assert torch.equal(torch.cat(layer(x[:, :2], x[:, 2:]), 1), y)
    assert torch.equal(torch.cat(layer(x[:, :2].clone(), x[:, 2:].clone()), 1), y)


def test_zero_weights_and_nan_weights_of_a_channel():
    torch.manual_seed(0)
    unit = layers.QuantizedConvBNAct(3, 3, 3, activation=None).eval()
    x = torch.rand(2, 3, 5, 5)
    unit.train()(x)
    unit.eval()
    with torch.no_grad():
        unit.conv.weight[0] = 0
        unit.conv.weight[1, 0, 0, 0] = NAN
    y = unit(x)
    bn = unit.bn
    zero = -bn.running_mean[0] / (bn.running_var[0] + bn.eps).sqrt()
    torch.testing.assert_close(y[:, 0], zero.expand_as(y[:, 0]))  # a norm of zero, in fp32
    assert y[:, 1].isnan().all() and y[:, 2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_modules_do_not_touch_the_codes(dtype):
    """As in fp32, with the result rounded once: 16 bits would hold neither the sums nor 1/s."""
    torch.manual_seed(0)
    conv = layers.QuantizedConv2d(4, 6, 3, bias=False, weight_bits=8, activation_bits=8)
    x = torch.rand(2, 4, 5, 5).to(dtype)
    conv(x.float())
    conv.eval()
    expected = conv(x.float())
    with torch.autocast("cpu", dtype):
        for images in (x, x.float()):
            y = conv(images)
            assert y.dtype == dtype and torch.equal(y, expected.to(dtype))
    conv.to(dtype).float()  # what a half module holds, bound included
    expected = conv(x.float()).to(dtype)
    assert torch.equal(conv.to(dtype)(x), expected)


def test_what_a_quantized_layer_is_handed_is_checked_before_anything_changes():
    layer = layers.QuantizedRiRLayer(4, 4)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="4"):
        layer(torch.rand(2, 3, 5, 5))
    with pytest.raises(TypeError, match="dtype"):
        layer(torch.rand(2, 4, 5, 5).double())
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        layer("x")
    assert all(torch.equal(layer.state_dict()[key], before[key]) for key in before)
