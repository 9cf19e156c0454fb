"""The autocast rule: what is convolved takes autocast's dtype, the norm's tensors stay as they are."""

import pytest
import torch

import rir_kernels as rir
from tests.support.helpers import make_call, output_gradient, run

conv_bn_act = rir.functional.conv_bn_act
CONVOLVED = ("x", "weight", "bias", "residual0")
impls = pytest.mark.parametrize("impl", ["torch", "reference"])
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def call_within_autocast(dtype=None, enabled=True, **inner):
    def function(*args, **kwargs):
        with torch.autocast("cpu", dtype, enabled):
            y = conv_bn_act(*args, **kwargs, **inner)
            assert torch.is_autocast_enabled("cpu") == enabled  # as it was
        return y

    return function


def cast_by_hand(dtype, **inner):
    def function(**kwargs):
        residual = tuple(r.to(dtype) for r in kwargs.pop("residual"))
        cast = {name: kwargs.pop(name).to(dtype) for name in ("x", "weight", "bias")}
        return conv_bn_act(**cast, residual=residual, **kwargs, **inner)

    return function


@impls
@halves
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual_at", ["pre_norm", "post_norm"])
def test_as_if_cast_by_hand(impl, dtype, training, residual_at):
    """Bit for bit: outputs, statistics, and gradients, which arrive in the tensors' own dtype."""
    tensors, options = make_call(
        dtype=torch.float32, residuals=(3,), bias=True, padding=1, training=training, residual_at=residual_at
    )
    dy = output_gradient(tensors, options)
    expected = run(cast_by_hand(dtype, impl=impl), tensors, options, dy)
    ours = run(call_within_autocast(dtype, impl=impl), tensors, options, dy)
    assert ours["y"].dtype == dtype
    for name, result in ours.items():
        assert torch.equal(result, expected[name]), name
        assert name == "y" or result.dtype == torch.float32


@pytest.mark.parametrize("name", CONVOLVED)
def test_what_is_convolved_may_differ_in_dtype(name):
    tensors, options = make_call(dtype=torch.float32, residuals=(3,), bias=True, padding=1, training=True)
    mixed = tensors | {name: tensors[name].half()}
    same = tensors | {name: tensors[name].half().float()}
    results = [run(call_within_autocast(torch.bfloat16), t, options)["y"] for t in (mixed, same)]
    assert torch.equal(*results)


def test_fp64_is_left_alone_as_by_torch():
    tensors, options = make_call(training=True)
    expected = run(conv_bn_act, tensors, options)["y"]
    assert torch.equal(run(call_within_autocast(torch.bfloat16), tensors, options)["y"], expected)


def test_a_device_without_autocast():
    x, weight = torch.empty(2, 3, 5, 5, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_bn_act(x, weight, training=True).dtype == torch.float32
    assert conv_bn_act(x, weight, training=True).shape == (2, 4, 3, 3)


MODULES = {
    "layer": lambda: rir.RiRLayer(4, 6, stride=2),
    "projections": lambda: rir.RiRBlock(4, 6, stride=2, shortcut="projection", outer_streams="both"),
    "unit": lambda: rir.ConvBNAct(4, 6, 3, bias=True),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
@halves
def test_modules_keep_their_parameters_and_statistics(make, dtype):
    torch.manual_seed(0)
    module = make()
    golden = make()
    golden.load_state_dict(module.state_dict())
    golden.double()
    x = torch.randn(3, 4, 7, 6).to(dtype).float()
    with torch.autocast("cpu", dtype):
        y = module(x)
    y.float().square().mean().backward()
    golden(x.double()).square().mean().backward()
    assert y.dtype == dtype
    for (name, ours), theirs in zip(module.state_dict().items(), golden.state_dict().values(), strict=True):
        assert ours.dtype == (torch.int64 if name.endswith("tracked") else torch.float32)
        # a handful of roundings to `dtype` on the way, of values of order one
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=8 * torch.finfo(dtype).eps)
    for ours, theirs in zip(module.parameters(), golden.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        # a mean over 200 squares: wherever a ReLU's input falls on the other side of zero its gradient is small too
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_streams_may_differ_in_dtype_within_autocast():
    layer = rir.RiRLayer(4, 6)
    r, t = torch.randn(2, 2, 5, 5), torch.randn(2, 2, 5, 5).half()
    with torch.autocast("cpu", torch.bfloat16):
        together = torch.cat(layer(r, t), dim=1)
        assert torch.equal(together, layer(torch.cat([r, t.float()], dim=1)))
    assert together.dtype == torch.bfloat16
