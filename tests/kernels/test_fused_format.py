"""The memory format in a fused model: that of torch's own convolutions, and no copies from unit to unit."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rir_kernels as rir
from rir_kernels.autograd import registered_op
from rir_kernels.backends import plans
from rir_kernels.common import memory_format, warn
from rir_kernels.common.memory_format import is_channels_last
from rir_kernels.dispatch import plan_cache

from .targets import ieee_fp32  # noqa: F401 (an autouse fixture)

NCHW, NHWC = torch.contiguous_format, torch.channels_last
PAIRS = list(itertools.product((NCHW, NHWC), repeat=2))  # of images and weights


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """No plans from earlier calls, and nothing has been warned of."""
    monkeypatch.setattr(plan_cache, "_planned", plans.Kinds())
    monkeypatch.setattr(warn, "_warned", set())


class Unit(nn.Module):
    def __init__(self, kernel, stride, residual):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, kernel, stride, kernel // 2, bias=False)
        self.bn, self.residual = nn.BatchNorm2d(8), residual

    def forward(self, x, residual):
        y = self.bn(self.conv(x))
        if self.residual:
            y += residual
        return torch.relu(y)


def images(*shape, device, memory_format=NCHW):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return values.to(device).contiguous(memory_format=memory_format)


def fused(model, impl, operations):
    model = copy.deepcopy(model)
    assert len(rir.fuse_(model, impl=impl).replaced) == operations
    return model


def cases():
    geometry = list(itertools.product((1, 3), (1, 2), (True, False), (True, False)))
    found = [("torch", *rest) for rest in geometry]
    # the interpreter is slow: every value of every axis, but not with every other
    found += [(impl, *rest) for impl in ("triton", "hybrid") for rest in ((1, 2, True, True), (3, 1, False, False))]
    return [*found, ("triton", 3, 2, False, True)]


@pytest.mark.parametrize(("impl", "kernel", "stride", "training", "residual"), cases())
def test_strides_are_those_of_the_unfused_modules(impl, kernel, stride, training, residual, device):
    torch.manual_seed(0)
    unit, size, outputs = Unit(kernel, stride, residual).train(training).to(device), 4 // stride, []
    for of_images, of_weights in PAIRS:
        original = copy.deepcopy(unit).to(memory_format=of_weights)
        model = fused(original, impl, 1)
        inputs = [images(2, 4, 4, 4, device=device, memory_format=of_images)]
        inputs.append(images(2, 8, size, size, device=device, memory_format=of_images))
        expected = original(*inputs)
        assert is_channels_last(expected) == (NHWC in (of_images, of_weights))
        for _ in range(2):  # the first call, and one that finds the plan it left
            y = model(*inputs)
            assert y.stride() == expected.stride()
            outputs.append(y)
    if impl == "triton":  # the same kernels on the same numbers
        assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_gradients_have_the_format_of_what_they_belong_to(device):
    """x's and the weight's, to the letter where both formats fit; the numbers are those of channels_last throughout."""
    torch.manual_seed(0)
    unit, results = Unit(1, 2, residual=False).to(device), []
    for of_images, of_weights in (PAIRS[0], PAIRS[1], PAIRS[3]):
        model = fused(copy.deepcopy(unit).to(memory_format=of_weights), "triton", 1)
        x = images(2, 4, 4, 4, device=device, memory_format=of_images).requires_grad_()
        weight = model.conv.weight
        model(x, x).square().sum().backward(inputs=[x])
        (dweight,) = torch.autograd.grad(model(x, x).square().sum(), weight)
        assert x.grad.stride() == x.stride() and dweight.stride() == weight.stride()
        results.append((x.grad, dweight))
    for found in results[:2]:
        assert all(map(torch.equal, found, results[2]))


def three_units(device, memory_format):
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())]
    return nn.Sequential(*layers).to(device, memory_format=memory_format)


_OURS = {
    "rir_kernels::conv_bn_act": registered_op._forward,
    "rir_kernels::conv_bn_act_backward": registered_op._backward,
}


class _Transposes(TorchDispatchMode):
    """The operators that made an image in the other format, those within our own ops too."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.name() in _OURS:
            with self:
                return _OURS[operator.name()](*args)
        y = operator(*args, **(kwargs or {}))
        copied = operator.name() in ("aten::clone", "aten::copy_", "aten::_to_copy")
        source = args[1 if operator.name() == "aten::copy_" else 0]
        if copied and y.dim() == 4 and is_channels_last(y) != is_channels_last(source):
            self.found.append(tuple(y.shape))
        return y


@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_one_copy_at_the_entry(impl, device):
    """With channels_last weights, whatever comes in; nothing in backward. Without them, as many as there are edges."""
    x = images(2, 4, 4, 4, device=device)
    for of_weights, copies in ((NHWC, 1), (NCHW, 6)):
        model = fused(three_units(device, of_weights), impl, 3)
        with _Transposes() as transposes:
            y = model(x)
            assert transposes.found == [(2, 4, 4, 4)] * copies
            if of_weights == NHWC:
                y.square().sum().backward()
                assert transposes.found == [(2, 4, 4, 4)]
    # the plans of the same calls
    model = fused(three_units(device, NHWC), impl, 3)
    for _ in range(2):
        assert torch.equal(model(x), y)
    if impl == "triton":
        assert [(plan.copied, plan.in_place) for plan in plan_cache._planned.values()] == [(None, False), (None, True)]


def test_whose_rule_it_is_makes_another_plan(device):
    """The same tensors: a function returns x's format, a fused unit that of the convolution."""
    model = fused(Unit(1, 1, residual=False).to(device, memory_format=NHWC).eval(), "triton", 1)
    x, bn = images(2, 4, 4, 4, device=device), model.bn
    for _ in range(2):
        theirs = rir.functional.conv_bn_act(
            x,
            model.conv.weight,
            bn_weight=bn.weight,
            bn_bias=bn.bias,
            running_mean=bn.running_mean,
            running_var=bn.running_var,
            impl="triton",
        )
        ours = model(x, x)
        assert is_channels_last(ours) and not is_channels_last(theirs) and torch.equal(ours, theirs)
    assert len(plan_cache._planned) == 2


def test_copies_both_ways_are_warned_of_once(device, monkeypatch):
    monkeypatch.setattr(memory_format, "_WARNED_ON", device.type)
    x, weight = images(2, 4, 4, 4, device=device), torch.ones(4, 4, 1, 1, device=device)
    one_way = fused(three_units(device, NHWC), "triton", 3).eval()
    both_ways = fused(three_units(device, NCHW), "triton", 3).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", RuntimeWarning)
        one_way(x)
        both_ways(x.contiguous(memory_format=NHWC))
        for few in (x[:, :1], x[:, :, :1, :1]):  # nothing to transpose
            rir.functional.conv_bn_act(few, weight[:, : few.shape[1]], training=True, impl="triton")
        fused(three_units(device, NCHW), "torch", 3)(x)
    with pytest.warns(RuntimeWarning, match="x came contiguous") as caught, torch.no_grad():
        both_ways(x)
        rir.functional.norm_act(x, training=True, impl="triton")
    (message,) = (str(warning.message) for warning in caught if warning.category is RuntimeWarning)
    assert "model.to(memory_format=torch.channels_last)" in message
    assert "images.contiguous(memory_format=torch.channels_last)" in message


@pytest.mark.interpreter
def test_the_interpreter_copies_in_silence(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        rir.functional.norm_act(images(2, 4, 4, 4, device=device), training=True, impl="triton")
