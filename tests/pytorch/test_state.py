"""The state of fused models: casts, formats, devices, copies, processes, checkpoints old and new."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import rir_kernels as rir
from tests.pytorch.networks import BLOCKS, OPERATIONS, ResNet, images, resnet, resnet_twins
from tests.support.helpers import assert_within_budget
from tests.support.surgery_helpers import assert_same, fused_calls, randn, settle


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_casts(cast, training):
    fused, original = resnet_twins()
    for model in (fused, original):
        getattr(model.train(training), cast)()
    dtype = fused.conv1.weight.dtype
    golden, x = copy.deepcopy(original).double(), images(dtype=dtype)
    with fused_calls(OPERATIONS):
        ours = {"y": fused(x)} | dict(fused.named_buffers())
    theirs = {"y": original(x)} | dict(original.named_buffers())
    exact = {"y": golden(x.double())} | dict(golden.named_buffers())
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    assert_within_budget(ours, theirs, exact, dtype)


def test_channels_last():
    fused, original = (model.to(memory_format=torch.channels_last) for model in resnet_twins())
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = images().contiguous(memory_format=memory_format)
        assert_same(fused, original, x, calls=OPERATIONS)
        x = torch.rand(2, 8, 4, 4, dtype=x.dtype).contiguous(memory_format=memory_format)
        ours, theirs = (copy.deepcopy(model.layer1)(x) for model in (fused, original))
        assert ours.stride() == theirs.stride()
    weights, theirs = fused.parameters(), original.parameters()
    assert [p.grad.stride() for p in weights] == [p.grad.stride() for p in theirs]


def test_built_and_fused_on_the_meta_device():
    with torch.device("meta"):
        model = ResNet()
    assert len(rir.fuse_(model).replaced) == OPERATIONS
    assert model(torch.empty(4, 3, 8, 8, device="meta")).shape == (4, 5)
    original = resnet()
    model.to_empty(device="cpu").double().load_state_dict(original.state_dict())
    assert_same(model, original, images(), calls=OPERATIONS)


def test_to_the_meta_device_and_back():
    fused, original = resnet_twins()
    fused.to("meta")
    fused.load_state_dict(original.state_dict(), assign=True)
    assert fused.conv1.weight.data_ptr() == original.conv1.weight.data_ptr()
    fused.load_state_dict(copy.deepcopy(original.state_dict()), assign=True)
    assert_same(fused, original, images(), calls=OPERATIONS)


def test_lazy_modules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyConv2d(4, 3, bias=False), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Conv2d(4, 4, 1))
    report = rir.fuse_(model)
    assert not report.replaced and "Lazy" in report.skipped[0].reason
    model(images(dtype=torch.float32))
    original = copy.deepcopy(settle(model))
    assert [item.pattern for item in rir.fuse_(model).replaced] == ["conv_bn_act"]
    assert_same(model, original, images())


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": _saved,
    **{f"pickle {p}": lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_equal_and_independent(kind):
    fused, original = resnet_twins()
    twin, other = COPIES[kind](fused), copy.deepcopy(original)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
    with torch.no_grad():
        for model in (twin, other):
            for tensor in model.state_dict().values():
                tensor.add_(1)
    assert_same(twin, other, images(), calls=OPERATIONS)
    assert_same(fused, original, images(), calls=OPERATIONS)


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_go_both_ways(assign):
    fused, original = resnet_twins()
    assert list(fused.state_dict()) == list(original.state_dict())
    torch.manual_seed(1)
    other = settle(ResNet())
    fused.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_same(fused, other, images(), calls=OPERATIONS)
    original.load_state_dict(copy.deepcopy(fused.state_dict()), assign=assign)
    assert_same(fused, original, images(), calls=OPERATIONS)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    fused, original = resnet_twins()
    path = tmp_path / "model.safetensors"
    safetensors.save_model(fused, path)
    torch.manual_seed(1)
    other = settle(ResNet())
    assert safetensors.load_model(other, path) == (set(), [])
    assert_same(fused, other, images(), calls=OPERATIONS)
    rir.fuse_(other)
    safetensors.save_model(original, path)
    assert safetensors.load_model(other, path) == (set(), [])
    assert_same(other, original, images(), calls=OPERATIONS)


@pytest.mark.parametrize("name", ["RiRBlock", "ConvBNAct"])
def test_our_modules_on_the_meta_device(name):
    original = settle(BLOCKS[name]())
    with torch.device("meta"):
        module = BLOCKS[name]()
    assert module(torch.empty(2, 4, 6, 6, device="meta")).is_meta
    module.to_empty(device="cpu").double().load_state_dict(original.state_dict())
    x = randn(2, 4, 6, 6)
    assert torch.equal(module(x), original(x))
