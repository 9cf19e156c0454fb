"""Sums that the layer behind leaves: used where they are right, never otherwise, and nothing is held for longer."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import rir_kernels as rir
from rir_kernels.autograd.backward_fusion import Link
from rir_kernels.common import tracing
from rir_kernels.common.stream_views import split

from .targets import TARGETS, ieee_fp32, rand  # noqa: F401 (an autouse fixture)

targets = pytest.mark.parametrize("target", TARGETS)


@pytest.fixture
def spared(monkeypatch):
    """A list that grows with each backward pass of a layer: whether it was spared its reduction."""
    passes = []
    take = Link.claim

    def watched(link, dy):
        passes.append((sums := take(link, dy)) is not None)
        return sums

    monkeypatch.setattr(Link, "claim", watched)
    return passes


def _layers(target, *options):
    torch.manual_seed(0)
    layers = [rir.RiRLayer(8, 8, impl="triton", device=target[0], dtype=target[1], **more) for more in options]
    for layer in layers:
        nn.init.normal_(layer.bn.weight, 1.0, 0.3)
        nn.init.normal_(layer.bn.bias, 0.0, 0.3)
    return nn.ModuleList(layers).to(memory_format=torch.channels_last)


def _gradients(layers, function, x, way=contextlib.nullcontext):
    layers, x = copy.deepcopy(layers), x.detach().requires_grad_()
    with way():
        loss = function(layers, x).float().square().sum()
        return torch.autograd.grad(loss, [x, *layers.parameters()], materialize_grads=True)


def _assert_as_without_plans(layers, function, x):
    """But for the order of the sums: in each, errors grow like the root of the number of terms, and dz is rounded."""
    eps = max(8 * torch.finfo(torch.float32).eps, 2 * torch.finfo(x.dtype).eps)
    found, expected = (_gradients(layers, function, x, way) for way in (contextlib.nullcontext, tracing.no_replay))
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=4 * eps * plain.abs().max().item())


def _chain(layers, x):
    for layer in layers:
        x = layer(x)
    return x


@targets
def test_a_chain_reduces_once(target, spared):
    """What the last layer gets is anybody's; the others get what a layer of ours has computed."""
    layers, x = (
        _layers(target, {}, {"shortcut": "none"}, {"residual_fraction": 1.0}, {}),
        rand((2, 8, 5, 6), target, seed=1),
    )
    _gradients(layers, _chain, x)
    assert spared == [False, True, True, True]
    _assert_as_without_plans(layers, _chain, x)


def _chain_of_streams(layers, x):
    streams = x[:, :4], x[:, 4:]
    for layer in layers:
        streams = layer(*streams)
    return torch.cat(streams, dim=1)


@targets
def test_a_chain_of_streams_reduces_once(target, spared):
    """The streams' gradients lie side by side again where a layer takes them as one."""
    layers, x = _layers(target, {}, {"shortcut": "none"}, {}), rand((2, 8, 5, 6), target, seed=1)
    _gradients(layers, _chain_of_streams, x)
    assert spared == [False, True, True]
    _assert_as_without_plans(layers, _chain_of_streams, x)


def _block(layers, x):
    """An outer shortcut is a part of what the first layer takes: no sums are offered, as the gradient is another."""
    y = layers[0](x)
    return layers[2](layers[1](y), outer=split(y, 4)[0])


def _streams(function):
    """function(layer, r, t), in the middle."""

    def chain(layers, x):
        return layers[2](torch.cat(function(layers[1], *layers[0](x[:, :4], x[:, 4:])), dim=1))

    return chain


def _a_hook_on_one(layer, r, t):
    t.register_hook(lambda grad: 2 * grad)
    return layer(r, t)


def _two_layers(layers, x):
    y = layers[0](x)
    return layers[1](y) + layers[2](y)


def _a_layer_and_an_operator(layers, x):
    y = layers[0](x)
    return layers[1](y) + torch.sin(y)


def _an_operator_and_a_layer(layers, x):
    y = layers[0](x)
    return torch.sin(y) + layers[1](y)


def _residual_too(layers, x):
    y = layers[0](x)
    return layers[1](y, outer=y)


def _residual_later(layers, x):
    y = layers[0](x)
    return layers[2](layers[1](y), outer=y)


def _hook(change):
    def function(layers, x):
        y = layers[0](x)
        y.register_hook(change)
        return layers[1](y)

    return function


CASES = {
    "two layers": _two_layers,
    "a layer and an operator": _a_layer_and_an_operator,
    "an operator and a layer": _an_operator_and_a_layer,
    "residual too": _residual_too,
    "residual later": _residual_later,
    "a hook": _hook(lambda grad: 2 * grad),
    "a hook in place": _hook(lambda grad: grad.mul_(2)),
    "a slice": lambda layers, x: layers[1](layers[0](x)[:, [1, 0, 2, 3, 4, 5, 6, 7]]),
    "in place": lambda layers, x: layers[1](layers[0](x).mul_(2)),
    "a block": _block,
    "swapped streams": _streams(lambda layer, r, t: layer(t, r)),
    "one stream twice": _streams(lambda layer, r, t: layer(r, r)),
    "one stream elsewhere": _streams(lambda layer, r, t: (layer(r, t)[0], torch.sin(t))),
    "a hook on a stream": _streams(_a_hook_on_one),
    "a hook in place on a stream": _streams(
        lambda layer, r, t: t.register_hook(lambda grad: grad.mul_(2)) and layer(r, t)
    ),
}


@targets
@pytest.mark.parametrize("function", CASES.values(), ids=CASES.keys())
def test_where_the_gradient_is_another(target, function, spared):
    _gradients(_layers(target, {}, {}, {}), function, rand((2, 8, 4, 4), target, seed=1))
    # of three layers in turn the one between; of those whose gradient is another none
    assert sum(spared) == (1 if function in (_residual_later, _block) else 0)
    _assert_as_without_plans(_layers(target, {}, {}, {}), function, rand((2, 8, 4, 4), target, seed=1))


@targets
def test_strides_and_changes_of_width(target):
    layers = _layers(target, {}, {"stride": 2}, {"kernel_size": 1})
    layers.append(rir.RiRLayer(8, 12, impl="triton", device=target[0], dtype=target[1]))
    layers.append(rir.RiRLayer(12, 5, impl="triton", device=target[0], dtype=target[1]))
    layers.append(rir.RiRLayer(5, 8, impl="triton", device=target[0], dtype=target[1]))
    _assert_as_without_plans(layers, _chain, rand((2, 8, 6, 6), target, seed=1))


@targets
def test_a_scale_after_the_norm_is_part_of_the_sums(target):
    """What the layer behind leaves knows nothing of it."""
    layers = _layers(target, {}, {"kernel_size": 1})
    options = {"residual_at": "post_norm", "branch_scale": 0.5, "impl": "triton"}
    layers[0] = rir.ConvBNAct(8, 8, 1, **options, device=target[0], dtype=target[1])
    _assert_as_without_plans(layers, _chain, rand((2, 8, 4, 4), target, seed=1))


@targets
def test_backward_twice_and_in_parts(target):
    layers, x = _layers(target, {}, {}, {}), rand((2, 8, 4, 4), target, seed=1)
    y = [x.requires_grad_()]
    for layer in layers:
        y.append(layer(y[-1]))
    loss = y[-1].float().square().sum()
    wanted = [x, *layers.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    part = torch.autograd.grad(loss, y[1], retain_graph=True)  # leaves sums that nobody takes
    part = torch.autograd.grad(y[1], [x, *layers[0].parameters()], part[0] * 2, retain_graph=True)
    again = torch.autograd.grad(loss, wanted)
    eps = max(8 * torch.finfo(torch.float32).eps, 2 * torch.finfo(x.dtype).eps)
    for ours, plain in zip(again, first, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=4 * eps * plain.abs().max().item())
    for ours, plain in zip(part, [first[0], *first[1:4]], strict=True):
        torch.testing.assert_close(ours, 2 * plain, rtol=0, atol=8 * eps * plain.abs().max().item())


@targets
def test_nothing_is_held_after_backward(target):
    """The loss, and so the graph, may live on: activations do not."""
    layers, x = _layers(target, {}, {}), rand((2, 8, 4, 4), target, seed=1)
    loss = _chain(layers, x).float().square().sum()
    node = loss
    while not hasattr(node, "link"):
        node = (node.grad_fn if node is loss else node).next_functions[0][0]
    links = [node.link, node.next_functions[0][0].link]
    held = [StorageWeakRef(link.norm[0].untyped_storage()) for link in links]
    loss.backward()
    assert all(storage.expired() for storage in held)
    assert [link._sums for link in links] == [None, None]


@targets
def test_hooks_that_move_what_is_saved(target, spared):
    """save_on_cpu frees the GPU's memory: nothing may be kept there beside."""
    layers, x = _layers(target, {}, {}), rand((2, 8, 4, 4), target, seed=1).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        loss = _chain(layers, x).float().square().sum()
    loss.backward()
    assert len(spared) == 2
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
