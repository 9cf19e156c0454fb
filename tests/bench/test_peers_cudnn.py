"""The cuDNN peer: its mathematics with torch in the place of cuDNN, and that cuDNN accepts its graphs."""

import copy
import importlib
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rir_kernels as rir
from bench.peers import cudnn_graph, cudnn_ops, cudnn_plans
from tests.support.helpers import assert_same_results, scrambled


class Block(nn.Module):
    """An ordinary ResNet block, with a downsample branch where the shape changes."""

    def __init__(self, in_channels, channels, stride=1, **options):
        super().__init__()
        self.conv1 = rir.ConvBNAct(in_channels, channels, 3, stride=stride)
        self.conv2 = rir.ConvBNAct(channels, channels, 3, **options)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = rir.ConvBNAct(in_channels, channels, 1, stride=stride, activation=None)

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        return self.conv2(self.conv1(x), residual=identity)


MODULES = {
    "layer": lambda: rir.RiRLayer(16, 16),
    "layer, stride 2": lambda: rir.RiRLayer(16, 32, stride=2),
    "layer, wider": lambda: rir.RiRLayer(16, 32),
    "layer, narrower": lambda: rir.RiRLayer(32, 16, residual_fraction=0.25),
    "layer, fraction 0": lambda: rir.RiRLayer(16, 16, residual_fraction=0),
    "layer, fraction 1": lambda: rir.RiRLayer(16, 16, residual_fraction=1),
    "layer, no shortcut": lambda: rir.RiRLayer(16, 16, shortcut="none"),
    "layer, projection": lambda: rir.RiRLayer(16, 32, stride=2, shortcut="projection"),
    "layer, scaled": lambda: rir.RiRLayer(16, 16, branch_scale=0.3),
    "layer, cumulative": lambda: rir.RiRLayer(16, 16, momentum=None),
    "block": lambda: rir.RiRBlock(16, 16),
    "block, stride 2": lambda: rir.RiRBlock(16, 32, stride=2, outer_streams="both"),
    "block, post_act": lambda: rir.RiRBlock(16, 32, stride=2, shortcut="projection", outer_shortcut="post_act"),
    "basic block": lambda: Block(16, 16),
    "basic block, stride 2": lambda: Block(16, 32, stride=2),
    "basic block, scaled": lambda: Block(16, 16, branch_scale=0.3),
    "basic block, no ReLU": lambda: Block(16, 16, activation=None),
    "basic block, pre_norm": lambda: Block(16, 16, residual_at="pre_norm", branch_scale=0.3),
    "odd channels": lambda: rir.ConvBNAct(16, 10, 1, activation=None),
}


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    return scrambled(MODULES[request.param]().to(memory_format=torch.channels_last))


def image(module, dtype=torch.float64):
    channels = next(m for m in module.modules() if isinstance(m, (rir.RiRLayer, rir.ConvBNAct)))
    channels = channels.in_channels if isinstance(channels, rir.RiRLayer) else channels.conv.in_channels
    x = torch.randn(2, channels, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype, memory_format=torch.channels_last)


@pytest.fixture
def by_torch(monkeypatch):
    """Each of cuDNN's graphs as a line of torch, which also checks what cuDNN would assume: dense vectors, no NaN."""

    def vector(v):
        return 1.0 if v is None else v.view(-1, 1, 1)

    def finish(y, scale, shift, addends, relu):
        y = y * vector(scale) + (0.0 if shift is None else shift.view(-1, 1, 1))
        for r, mask in addends:
            assert r.shape == y.shape and r.stride(1) == 1
            y = y + r * vector(mask)
        return (F.relu(y) if relu else y).contiguous(memory_format=torch.channels_last)

    def options(spec):
        return spec.stride, spec.padding, spec.dilation, spec.groups

    def conv(x, w, spec, *, scale=None, shift=None, addends=(), relu=False):
        return finish(F.conv2d(x, w, None, *options(spec)), scale, shift, addends, relu).to(x.dtype)

    def dgrad(dz, w, spec, shape, *, scale=None, addends=()):
        return finish(torch.nn.grad.conv2d_input(shape, w, dz, *options(spec)), scale, None, addends, False)

    def wgrad(dz, x, spec, shape):
        return torch.nn.grad.conv2d_weight(x, shape, dz, *options(spec))

    def bn_train(z, gamma, beta, running_mean, running_var, *, momentum, eps, relu, residual=None):
        dtype, z = z.dtype, z.to(gamma.dtype)
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
        invstd, count = torch.rsqrt(var + eps), z.numel() // z.shape[1]
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * count / (count - 1), momentum)
        y = (z - vector(mean)) * vector(invstd) * vector(gamma) + vector(beta)
        y = y if residual is None else y + residual
        y = (F.relu(y) if relu else y).to(dtype)
        return y, mean, invstd, None if residual is None else y > 0

    def bn_backward(dy, z, gamma, beta, mean, invstd, mask, *, relu, want_residual):
        normed = (z - vector(mean)) * vector(invstd)
        if mask is None and relu:
            mask = normed * vector(gamma) + vector(beta) > 0
        dy = dy if mask is None else dy * mask
        dbeta, dgamma = dy.sum((0, 2, 3)), (dy * normed).sum((0, 2, 3))
        count = z.numel() // z.shape[1]
        dz = vector(gamma * invstd) * (dy - vector(dbeta / count) - normed * vector(dgamma / count))
        dz = dz.to(z.dtype, memory_format=torch.channels_last)
        return dz, dgamma, dbeta, dy if want_residual else None

    for function in (conv, dgrad, wgrad, bn_train, bn_backward):
        monkeypatch.setattr(cudnn_ops, function.__name__, function)


# fp64 with sums in another order
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def test_training_is_the_modules_own(module, by_torch):
    module = module.double()
    x = image(module)
    converted = cudnn_graph.convert(module, x, training=True)
    assert_same_results(converted, copy.deepcopy(module).train(), x, **TOLERANCE)


@torch.no_grad()
def test_inference_is_the_modules_own(module, by_torch):
    module = module.double()
    x = image(module)
    converted = cudnn_graph.convert(module, x, training=False)
    torch.testing.assert_close(converted(x), module.eval()(x), **TOLERANCE)
    assert converted.state_dict().keys() == module.state_dict().keys()


def test_the_copy_is_independent_and_runs_on_cudnn(module, by_torch):
    converted = cudnn_graph.convert(module, image(module), training=False)
    ours = [m for m in converted.modules() if isinstance(m, (rir.RiRLayer, rir.ConvBNAct))]
    assert ours and all("Cudnn" in type(m).__name__ for m in ours)
    assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in converted.parameters()}


def test_autocast_casts_as_ours_does(by_torch):
    module = scrambled(rir.RiRLayer(16, 16).to(memory_format=torch.channels_last))
    x = image(module, torch.float32)
    converted = cudnn_graph.convert(module, x, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = converted(x)
    (grad,) = torch.autograd.grad(y.sum(), converted.weight)
    assert (y.dtype, grad.dtype) == (torch.bfloat16, torch.float32)


def test_what_it_does_not_do_is_said(by_torch):
    unit = rir.ConvBNAct(8, 8, 3, bias=True)
    x = image(unit, torch.float32)
    with pytest.raises(NotImplementedError, match="bias"):
        cudnn_graph.convert(unit, x, training=True)(x)
    with pytest.raises(NotImplementedError, match="no_grad"):
        cudnn_graph.convert(unit, x, training=False)(x)
    with pytest.raises(NotImplementedError, match="conv1"):
        block = Block(8, 8)
        block.conv1.bn = nn.BatchNorm2d(8, affine=False)
        cudnn_graph.convert(block, x, training=True)


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (None, "cannot be imported"),
        (SimpleNamespace(backend_version=lambda: 8907), "needs cuDNN 9, found 8907"),
        (
            SimpleNamespace(backend_version=Mock(side_effect=RuntimeError("no symbol"))),
            "library is not found: no symbol",
        ),
    ],
)
def test_absent_says_why(package, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", package)
    assert "CUDA device" in cudnn_graph.absent(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reason in cudnn_graph.absent(torch.device("cuda"))


# what cuDNN's own checks make of the graphs; they need its library, but no GPU

H200 = """{"deviceId": 0, "cudaDeviceId": 0, "deviceVer": 900, "driverVer": 13000, "maxGridSize": [2147483647, 65535,
65535], "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536, "multiProcessorCount": 132, "warpSize": 32,
"maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024,
"maxRegistersPerSM": 65536, "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "pciDeviceId": 0,
"isTccDriver": 0, "supportCoopLaunch": 1, "smClockRateKHz": 1980000, "memClockRateKHz": 3201000,
"l2CacheSize": 62914560, "deviceName": "NVIDIA H200", "totalGlobalMem": 150000000000}"""


@pytest.fixture
def described(monkeypatch):
    """Graphs are described and checked for a GPU that need not be there, and not run: outputs are zeros."""
    try:
        cudnn = importlib.import_module("cudnn")
        cudnn.backend_version()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs nvidia-cudnn-frontend and cuDNN's library: {error}")
    try:
        device = cudnn.create_device_properties(H200)
    except Exception as error:  # before cuDNN 9.11, or where it describes devices otherwise
        pytest.skip(f"this cuDNN takes no such description of a device: {error}")
    seen = []

    def run(define, options, inputs, outputs):
        inputs = {name: t for name, t in inputs.items() if t is not None}
        graph = cudnn_plans.new_graph(cudnn, device_property=device)
        names = {name: uid for uid, name in enumerate([*inputs, *outputs], 1)}
        cudnn_plans.describe(cudnn, graph, names, define, options, inputs, outputs)
        graph.validate()
        graph.build_operation_graph()
        seen.append((define.__name__, graph, outputs))
        for tensor in outputs.values():
            tensor.zero_()
        return outputs

    monkeypatch.setattr(cudnn_ops, "run", run)
    monkeypatch.setattr(cudnn_ops, "fastest", lambda key, ways: lambda: [way() for way in ways])
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cudnn_accepts_the_graphs(module, dtype, described):
    module = module.to(dtype)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.float()
    x = image(module, dtype)
    with torch.no_grad():
        cudnn_graph.convert(module, x, training=False)(x)
    assert {name for name, *_ in described} == {"_conv", "_pointwise"}
    described.clear()
    cudnn_graph.convert(module, x, training=True)(x.requires_grad_()).sum().backward()
    if next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)).num_features % 8 == 0:
        assert {"_conv", "_bn_train", "_bn_backward", "_dgrad", "_wgrad"} <= {name for name, *_ in described}
