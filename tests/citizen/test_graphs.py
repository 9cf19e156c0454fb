"""preserved_statistics, by forwards within it; and on a GPU what it is for, CUDA graphs of fused models."""

import copy

import pytest
import torch
from torch import nn

import rir_kernels as rir
from tests.citizen.networks import OPERATIONS, images, resnet, twins
from tests.surgery_helpers import assert_same


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


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_cumulative_average_cannot_be_captured(impl, monkeypatch):
    unit = rir.ConvBNAct(3, 4, 3, momentum=None, impl=impl)
    unit(images(dtype=torch.float32))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = state(unit)
    with pytest.raises(RuntimeError, match="momentum=None reads the number of batches on the host"):
        unit(images(dtype=torch.float32))
    assert_unchanged(unit, before)
    unit.eval()(images(dtype=torch.float32))  # where nothing is read
    unit.bn.momentum = 0.1
    unit.train()(images(dtype=torch.float32))


def on_gpu(impl):
    """A fused model and a twin that runs eagerly, in fp32."""
    model = resnet().float().cuda()
    rir.fuse_(model, impl=impl)
    return model, copy.deepcopy(model)


# both run the same kernels, but torch's gradient of max_pool2d adds where windows overlap, in whatever order
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
gpu_impls = pytest.mark.parametrize("impl", ["triton", "hybrid"])


@pytest.mark.gpu
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
@gpu_impls
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_capture_by_hand(impl, warm):
    """Cold: kernels are compiled and loaded during the capture, which only our own can be: cuDNN's plans cannot."""
    if impl == "hybrid" and not warm:
        pytest.skip("the vendor's library makes its handle and its plan outside of captures")
    unit = rir.ConvBNAct(3, 24 if warm else 40, 3, impl=impl, device="cuda")  # a width of its own is not compiled yet
    eager, x = copy.deepcopy(unit), images().float().cuda()
    before = state(unit)
    with rir.preserved_statistics(unit), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3 * warm):
                unit(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = unit(x)
    assert_unchanged(unit, before)
    for seed in (1, 2):
        x.copy_(images(seed=seed))
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(y, eager(x.clone()), **CLOSE)
    for ours, expected in zip(unit.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.gpu
def test_a_cumulative_average_says_so_where_it_is_captured():
    unit, x = rir.ConvBNAct(3, 8, 3, momentum=None, device="cuda"), images().float().cuda()
    unit(x)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="momentum=None"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        unit(x)
