"""Copying, saving, compiling, exporting and wrapping a model work with the classes that fuse_ has swapped."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from rir_kernels import reference
from rir_kernels.surgery import fuse_, unfuse_
from tests.support.surgery_helpers import (
    CLOSE,
    OPERATIONS,
    X,
    assert_compiled_same,
    assert_same,
    counting,
    fused_calls,
    net,
    pair_of,
    randn,
    settle,
)
from tests.support.surgery_models import downsample, unit


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": _saved,
    **{f"pickle {p}": lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_run_on_their_own_weights(kind):
    fused, original = pair_of(net())
    twin, other = COPIES[kind](fused), copy.deepcopy(original)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in fused.parameters()}
    with torch.no_grad():
        for model in (twin, other):
            for tensor in model.state_dict().values():
                tensor.add_(1)
    assert_same(twin, other, X, calls=OPERATIONS)
    assert_same(fused, original, X, calls=OPERATIONS)
    assert [type(m) for m in unfuse_(twin).modules()] == [type(m) for m in original.modules()]
    assert all(a is not b for a, b in zip(fused.modules(), twin.modules(), strict=True))


def test_shallow_copy_shares_the_weights():
    fused, _ = pair_of(net())
    twin = copy.copy(fused.layers[0])
    assert type(twin) is type(fused.layers[0]) and twin.conv_rr is fused.layers[0].conv_rr
    unfuse_(twin)
    assert type(fused.layers[0]) is not type(twin)


def test_optimizer_made_before_fusing():
    fused, original = copy.deepcopy(model := net()), model
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (fused, original)]
    fuse_(fused)
    for _ in range(3):
        for m, optimizer in zip((fused, original), optimizers, strict=True):
            optimizer.zero_grad()
            m(X).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(fused.state_dict(), original.state_dict(), **CLOSE)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
def test_compiled_without_graph_breaks(training):
    (fused, original), convolutions = pair_of(net().train(training)), []
    fused.compile(fullgraph=True, backend=counting(convolutions))
    assert_same(fused, original, X, calls=0)
    assert convolutions == [OPERATIONS]


def test_compiled_before_fusing():
    model, convolutions = net().eval(), []
    expected = model(X)
    compiled = torch.compile(model, fullgraph=True, backend=counting(convolutions))
    compiled(X)
    fuse_(model)
    for _ in range(2):
        torch.testing.assert_close(compiled(X), expected, **CLOSE)
    assert convolutions == [9, OPERATIONS]
    unfuse_(model)
    assert torch.equal(compiled(X), expected)


CHANGES = {
    "layer, mode": lambda m: m.eval(),
    "layer, one mode": lambda m: m.bn_r.eval(),
    "layer, parametrized": lambda m: parametrize.register_parametrization(m.conv_rt, "weight", nn.Tanh()),
    "chain, eps": lambda m: setattr(m[1], "eps", 0.5),
    "chain, replaced": lambda m: m.__setitem__(2, nn.Sigmoid()),
    "chain, weight": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach() * 2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_compiling_are_noticed(name):
    model = reference.RiRLayer(4, 4) if name.startswith("layer") else unit()
    assert_compiled_same(*pair_of(settle(model), 1), CHANGES[name])


def test_classes_do_not_share_their_recompilations():
    """The compiler counts up to eight for each code object, so different kinds of blocks need different ones."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for model in (downsample(), unit(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())):
            assert fuse_(settle(model)).replaced
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert torch.equal(compiled(randn(2, 4, 3, 3)), model(randn(2, 4, 3, 3)))


def test_export():
    fused, original = pair_of(net().eval())
    program = torch.export.export(fused, (X,))
    assert sum("conv2d" in str(node.target) for node in program.graph.nodes) == OPERATIONS
    torch.testing.assert_close(program.module()(X), original(X), **CLOSE)


def test_functional_call_and_transforms():
    fused, original = pair_of(net().eval())
    state = {name: value.detach() * 1.5 for name, value in fused.state_dict().items()}
    inputs = torch.stack([X, 2 * X])

    def by_sample(model):  # gradients of the parameters
        def loss(values, x):
            return torch.func.functional_call(model, state | values, (x,)).square().sum()

        values = {name: state[name] for name, _ in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, inputs)

    with fused_calls(OPERATIONS):
        found = by_sample(fused)
    torch.testing.assert_close(found, by_sample(original), **CLOSE)


def test_autocast():
    """bf16 has 8 bits: with norms between, a few operations agree to some units of 2**-8."""
    fused, original = (model.float() for model in pair_of(net()))
    with torch.autocast("cpu", torch.bfloat16):
        with fused_calls(OPERATIONS):
            found = fused(X.float())
        expected = original(X.float())
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_hooks_on_the_unit_itself_run():
    fused, original = pair_of(net())
    for model in (fused, original):
        for part in (model.stem, model.layers[1]):
            part.register_forward_pre_hook(lambda _module, inputs: tuple(2 * x for x in inputs))
        model.stem.register_forward_hook(lambda _module, _inputs, output: output + 1)
        model.stem.register_full_backward_hook(lambda _module, grads, _: (grads[0] * 3,))
    assert_same(fused, original, X, calls=OPERATIONS)
