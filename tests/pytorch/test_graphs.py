"""preserved_statistics, by forwards within it; and on a GPU what it is for, CUDA graphs of fused models."""

import copy

import pytest
import torch
from torch import nn

import rir_kernels as rir
from tests.pytorch.networks import OPERATIONS, images, resnet, twins
from tests.support.surgery_helpers import assert_same


def state(model):
    return {name: (id(t), t.data_ptr(), t.clone()) for name, t in model.named_buffers()}


def assert_unchanged(model, before):
    assert dict(model.named_buffers()).keys() == before.keys()
    for name, buffer in model.named_buffers():
        identity, address, value = before[name]
        assert (id(buffer), buffer.data_ptr()) == (identity, address) and torch.equal(buffer, value), name


def test_forwards_leave_no_trace():
    model, original = twins(resnet())
    before = state(model)
    with rir.preserved_statistics(model):
        for _ in range(2):
            model(images()).sum().backward()
        assert model.bn1.num_batches_tracked == 2
    assert_unchanged(model, before)
    assert_same(model, original, images(), calls=OPERATIONS)  # which counts again


def test_nor_do_those_that_fail():
    model = resnet()
    before = state(model)
    with pytest.raises(ZeroDivisionError), rir.preserved_statistics(model):
        model(images())
        model(1 / 0)
    assert_unchanged(model, before)


def test_buffers_that_are_replaced_absent_or_shared():
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(shared, nn.BatchNorm2d(3, track_running_stats=False), shared)
    other = nn.BatchNorm2d(3)
    before, before_other = state(model), state(other)
    with rir.preserved_statistics(model, other), torch.no_grad():
        other(model(images().float()))
        shared.running_mean = torch.ones(3)
        shared.half()
    assert_unchanged(model, before)
    assert_unchanged(other, before_other)


def test_only_modules():
    with pytest.raises(TypeError, match="takes modules, got list"), rir.preserved_statistics([resnet()]):
        pass


def on_gpu(impl):
    """A fused model and a twin that runs eagerly, in fp32."""
    model = resnet().float().cuda()
    rir.fuse_(model, impl=impl)
    return model, copy.deepcopy(model)


# both run the same kernels, but torch's gradient of max_pool2d adds where windows overlap, in whatever order
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
gpu_impls = pytest.mark.parametrize("impl", ["triton", "hybrid"])


@pytest.mark.gpu
@pytest.mark.real_gpu("CUDA graphs")
@gpu_impls
def test_replays_train_as_eager_calls_do(impl):
    model, eager = on_gpu(impl)
    batches = [images(seed=i).float().cuda() for i in range(3)]
    before = state(model)
    with rir.preserved_statistics(model):
        graphed = torch.cuda.make_graphed_callables(model, (batches[0].clone(),))
    assert_unchanged(model, before)
    for x in batches:
        for m in (graphed, eager):
            m.zero_grad()
            m(x).square().sum().backward()
    assert graphed.bn1.num_batches_tracked == len(batches)
    for ours, expected in zip(graphed.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, **CLOSE)
    for (name, ours), expected in zip(graphed.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.gpu
@pytest.mark.real_gpu("CUDA graphs")
def test_a_cumulative_average_says_so_where_it_is_captured():
    unit, x = rir.ConvBNAct(3, 8, 3, momentum=None, device="cuda"), images().float().cuda()
    unit(x)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="momentum=None"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        unit(x)
