"""`recompute`: the same bits, and the outputs of layers are not kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import rir_kernels as rir

from .targets import TARGETS, ieee_fp32, rand  # noqa: F401 (an autouse fixture)

targets = pytest.mark.parametrize("target", TARGETS)
impls = pytest.mark.parametrize("impl", ["triton", "hybrid"])


def _network(target, impl, depth=3):
    torch.manual_seed(0)
    options = {"impl": impl, "device": target[0], "dtype": target[1]}
    layers = [rir.RiRLayer(8, 8, **options) for _ in range(depth)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def _step(model, x, within):
    """The gradients, and how many outputs of layers before the last were alive when the loss was there."""
    outputs = []
    handles = [
        layer.register_forward_hook(lambda _m, _i, y: outputs.append(StorageWeakRef(y.untyped_storage())))
        for layer in model[:-1]
    ]
    with within:
        loss = model(x).float().square().mean()
    for handle in handles:
        handle.remove()
    alive = sum(not output.expired() for output in outputs)
    return torch.autograd.grad(loss, [x, *model.parameters()]), alive


def _assert_same_bits(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)


@targets
@impls
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen norm"])
def test_same_gradients_from_half_the_memory(target, impl, training):
    model = _network(target, impl).train(training)
    x = rand((2, 8, 4, 4), target, seed=1).requires_grad_()
    expected, alive = _step(model, x, torch.enable_grad())
    assert alive == 2
    found, alive = _step(model, x, rir.recompute())
    assert alive == 0
    if training or target[0].type == "cpu":
        _assert_same_bits(found, expected)
    for ours, plain in zip(found, expected, strict=True):
        # at inference the convolution makes y, and another kernel again: the compiler may round their products apart
        torch.testing.assert_close(ours, plain, rtol=0, atol=4 * torch.finfo(target[1]).eps * plain.abs().max().item())


@targets
def test_whoever_consumes_the_output(target):
    """A convolution of torch's own saves the same tensor; a slice of it is kept as it is."""
    layer, x = _network(target, "triton", 1)[0], rand((2, 8, 4, 4), target, seed=1)
    weight = rand((4, 8, 1, 1), target, seed=2)
    for consume in (lambda y: F.conv2d(y, weight), lambda y: y[:, :4] * y[:, 4:], lambda y: y.mT @ y, torch.sin):
        results = []
        for within in (torch.enable_grad(), rir.recompute()):
            with within:
                loss = consume(layer(x)).float().square().sum()
            results.append(torch.autograd.grad(loss, layer.parameters(), retain_graph=True))
            _assert_same_bits(results[-1], torch.autograd.grad(loss, layer.parameters()))  # a second time
        _assert_same_bits(*results)


@targets
def test_changes_in_place(target):
    """Of the output before it is saved: that is kept. Of what it would be made from: an error, no wrong number."""
    model = _network(target, "triton", 2)
    x = rand((2, 8, 4, 4), target, seed=1)
    results = []
    for within in (torch.enable_grad(), rir.recompute()):
        with within:
            loss = model[1](model[0](x).mul_(2.0)).float().square().sum()
        results.append(torch.autograd.grad(loss, model.parameters()))
    _assert_same_bits(*results)
    for changed in (model[0].bn.weight, model[1].weight):
        with rir.recompute():
            loss = model(x).float().sum()
        with torch.no_grad():
            changed.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@targets
@pytest.mark.parametrize("at, kept", [("pre_norm", 0), ("post_norm", 1)])
def test_a_residual_after_the_norm_is_not_told_by_z(target, at, kept):
    torch.manual_seed(0)
    options = {"device": target[0], "dtype": target[1], "impl": "triton"}
    block = rir.ConvBNAct(8, 8, 3, residual_at=at, **options)
    last = rir.ConvBNAct(8, 8, 3, **options)
    x = rand((2, 8, 4, 4), target, seed=1)
    results = []
    for within in (torch.enable_grad(), rir.recompute()):
        with within:
            y = block(x, x)
            output = StorageWeakRef(y.untyped_storage())
            loss = last(y).float().square().sum()
            del y
        alive = not output.expired()
        results.append(torch.autograd.grad(loss, [*block.parameters(), *last.parameters()]))
    _assert_same_bits(*results)
    assert alive == kept
