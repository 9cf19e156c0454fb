"""convert_sync_batchnorm on a model, in a process that has no others; with others: tests/distributed."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import rir_kernels as rir
from rir_kernels import reference
from tests.support.surgery_helpers import (
    CLOSE,
    OPERATIONS,
    Doubled,
    ShiftedNorm,
    assert_same,
    counting,
    fused_calls,
    net,
    randn,
    step,
)

X = randn(2, 4, 6, 6)


def converted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return rir.convert_sync_batchnorm(model)


def test_only_the_class_changes():
    model = net()
    before = list(model.state_dict()), [id(t) for t in (*model.parameters(), *model.buffers())], model.stem[1]
    seen = []
    model.stem[1].register_forward_hook(lambda *_: seen.append(1))
    assert converted(model.eval()) is model
    assert before[0] == list(model.state_dict()) and model.stem[1] is before[2]
    assert before[1] == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert type(model.stem[1]) is rir.SyncBatchNorm2d and not model.stem[1].training
    assert {type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {rir.SyncBatchNorm2d}
    model(X)
    assert seen


def test_a_norm_by_itself_and_twice():
    norm = nn.BatchNorm2d(4)
    assert converted(norm) is norm and converted(norm) is norm and type(norm) is rir.SyncBatchNorm2d


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_a_batch_norm(training):
    model = net().train(training)
    twin = converted(copy.deepcopy(model))
    assert_same(twin, model, X, exact=True, calls=0)
    for m in (model, twin):
        rir.fuse_(m)
    found, expected = step(twin, X), step(model, X)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("convert_first", [True, False])
def test_fused_before_or_after(convert_first):
    original, model = net(), net()
    for change in (converted, rir.fuse_) if convert_first else (rir.fuse_, converted):
        change(model)
    assert_same(model, original, X, calls=OPERATIONS)
    rir.unfuse_(model)
    assert type(model.stem) is nn.Sequential and type(model.stem[1]) is rir.SyncBatchNorm2d
    assert_same(model, original, X, calls=0)


def test_norms_of_one_layer_must_be_of_one_kind():
    layer = reference.RiRLayer(4, 4)
    rir.fuse_(layer)
    converted(layer.bn_r)
    with fused_calls(0):
        layer(torch.randn(2, 4, 5, 5))
    converted(layer)
    with fused_calls(1):
        layer(torch.randn(2, 4, 5, 5))
    layer.bn_t.process_group = -100  # torch's mark of a group that this process is not in
    with fused_calls(0):
        layer(torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match="process group of the norms must agree"):
        rir.RiRLayer.from_reference(rir.unfuse_(layer))


def test_conversion_to_and_from_the_reference_keeps_the_kind():
    ref = converted(rir.RiRLayer(4, 4)).to_reference()
    assert type(ref.bn_r) is type(ref.bn_t) is rir.SyncBatchNorm2d
    assert type(rir.RiRLayer.from_reference(ref).bn) is rir.SyncBatchNorm2d


def test_what_is_left_alone_is_named():
    model = nn.ModuleDict(
        {
            "shifted": ShiftedNorm(4),
            "flat": nn.BatchNorm1d(4),
            "lazy": nn.LazyBatchNorm2d(),
            "parametrized": nn.BatchNorm2d(4),
            "overridden": nn.BatchNorm2d(4),
            "torchs": nn.SyncBatchNorm(4),
            "plain": nn.BatchNorm2d(4),
        }
    )
    parametrize.register_parametrization(model["parametrized"], "weight", Doubled())
    model["overridden"].forward = lambda x: x
    kinds = {name: type(m) for name, m in model.items()}
    with pytest.warns(UserWarning) as caught:
        rir.convert_sync_batchnorm(model)
    assert len(caught) == 1
    named = {name for name in kinds if f"{name} (" in str(caught[0].message)}
    assert named == {"shifted", "flat", "lazy", "parametrized", "overridden"}
    assert {name for name, m in model.items() if type(m) is not kinds[name]} == {"plain"}


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "save"])
def test_copies(kind):
    def saved(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    make = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": saved}[kind]
    model = converted(net())
    rir.fuse_(model)
    twin = make(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert_same(twin, net(), X, calls=OPERATIONS)


def test_compiled_without_graph_breaks_where_nothing_is_exchanged():
    torch._dynamo.reset()
    model = converted(net())
    rir.fuse_(model)
    model.compile(fullgraph=True, backend=counting(convolutions := []))
    assert_same(model, net(), X, calls=0)
    assert convolutions == [OPERATIONS]


def test_optimizer_made_before():
    model, twin = net(), net()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    converted(twin)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        m(X).square().sum().backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, **CLOSE)


def test_refusals():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got Tensor"):
        rir.convert_sync_batchnorm(X)
    with pytest.raises(TypeError, match=r"process_group must be a .* or None, got str"):
        rir.convert_sync_batchnorm(norm := nn.BatchNorm2d(4), "world")
    assert type(norm) is nn.BatchNorm2d
