"""The TensorRT peer: what its network computes, with torch in the place of TensorRT."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rir_kernels as rir
from bench.cases.networks import BasicBlock, Bottleneck, ResNet
from bench.peers import tensorrt_engine
from bench.peers.tensorrt_network import Translation
from models import RiR
from tests.support.helpers import scrambled


class Later:
    """A layer of TensorRT: what is set on it after it was added counts."""

    def __init__(self, compute):
        self.__dict__["compute"] = compute

    def get_output(self, index):
        assert index == 0
        return self.compute(self)


class Network:
    """INetworkDefinition, as far as it is used, computing at once."""

    def add_convolution_nd(self, input, num_output_maps, kernel_shape, kernel, bias=None):
        assert (num_output_maps, *kernel_shape) == (kernel.shape[0], *kernel.shape[2:])
        return Later(
            lambda layer: F.conv2d(
                input, kernel, bias, layer.stride_nd, layer.padding_nd, layer.dilation_nd, layer.num_groups
            )
        )

    def add_elementwise(self, a, b, operation):
        # TensorRT broadcasts sizes of one, and no dimensions
        assert a.dim() == b.dim()
        return Later(lambda layer: operation(a, b))

    def add_activation(self, input, operation):
        return Later(lambda layer: operation(input))

    def add_constant(self, shape, weights):
        return Later(lambda layer: weights.view(shape))

    def add_pooling_nd(self, input, operation, window):
        return Later(lambda layer: operation(input, window, layer.stride_nd, layer.padding_nd))

    def add_reduce(self, input, operation, axes, keep_dims):
        return Later(lambda layer: operation(input, [i for i in range(4) if axes >> i & 1], keep_dims))

    def add_matrix_multiply(self, a, operation_a, b, operation_b):
        return Later(lambda layer: operation_a(a) @ operation_b(b))


TRT = SimpleNamespace(
    ElementWiseOperation=SimpleNamespace(SUM=torch.add, PROD=torch.mul),
    ActivationType=SimpleNamespace(RELU=torch.relu),
    PoolingType=SimpleNamespace(MAX=F.max_pool2d),
    ReduceOperation=SimpleNamespace(AVG=torch.mean),
    MatrixOperation=SimpleNamespace(NONE=lambda m: m, TRANSPOSE=lambda m: m.T),
)

MODULES = {
    "layer": lambda: rir.RiRLayer(8, 8),
    "layer, stride 2": lambda: rir.RiRLayer(8, 16, stride=2),
    "layer, narrower": lambda: rir.RiRLayer(16, 8, residual_fraction=0.25),
    "layer, fraction 0": lambda: rir.RiRLayer(8, 8, residual_fraction=0),
    "layer, fraction 1": lambda: rir.RiRLayer(8, 8, residual_fraction=1),
    "layer, no shortcut": lambda: rir.RiRLayer(8, 8, shortcut="none"),
    "layer, projection": lambda: rir.RiRLayer(8, 16, stride=2, shortcut="projection", branch_scale=0.3),
    "block": lambda: rir.RiRBlock(8, 8),
    "block, stride 2": lambda: rir.RiRBlock(8, 16, stride=2, outer_streams="both"),
    "block, projections": lambda: rir.RiRBlock(8, 16, stride=2, outer_streams="both", shortcut="projection"),
    "block, post_act": lambda: rir.RiRBlock(8, 8, outer_shortcut="post_act", outer_streams="both"),
    "block, post_act, stride 2": lambda: rir.RiRBlock(8, 16, stride=2, outer_shortcut="post_act"),
    "block, no outer": lambda: rir.RiRBlock(8, 8, outer_shortcut="none"),
    "unit": lambda: rir.ConvBNAct(8, 6, (3, 1), bias=True, stride=2, dilation=2, groups=2, activation=None),
    "basic block": lambda: BasicBlock(8, 8),
    "basic block, stride 2": lambda: BasicBlock(8, 16, 2),
    "bottleneck": lambda: Bottleneck(8, 8, 2),
    "ResNet": lambda: nn.Sequential(nn.Identity(), ResNet(BasicBlock, (1, 1), num_classes=5)),
    "RiR": lambda: RiR(in_channels=8, width=(8, 16), depth=(1, 1)),
}


@pytest.fixture(autouse=True)
def in_torch(monkeypatch):
    """The translation's numbers stay torch's tensors."""
    monkeypatch.setattr(Translation, "weights", lambda self, tensor: tensor.detach().to(self.dtype))


def image(module):
    weight = next(p for p in module.parameters() if p.dim() == 4)
    torch.manual_seed(1)
    return torch.randn(2, weight.shape[1] * (2 if "ConvBNAct" in type(module).__name__ else 1), 12, 12).double()


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
def test_the_network_computes_what_the_module_does(name):
    torch.manual_seed(0)
    module = scrambled(MODULES[name]()).double().eval()
    x = image(module)
    before = copy.deepcopy(module.state_dict())
    y = Translation(TRT, Network(), torch.float64).module(module, x)
    # fp64, with factors multiplied in another order
    torch.testing.assert_close(y, module(x), rtol=1e-9, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_an_identity_is_neither_sliced_nor_convolved():
    translation = Translation(TRT, Network(), torch.float64)
    module = scrambled(rir.RiRBlock(8, 8)).double().eval()
    translation.module(module, image(module))
    assert translation.convolutions == 2


def test_what_it_cannot_translate_is_named():
    module = nn.Sequential(rir.ConvBNAct(8, 8, 3), nn.Dropout2d())
    with pytest.raises(NotImplementedError, match="Dropout2d"):
        Translation(TRT, Network(), torch.float32).module(module.eval(), torch.zeros(1, 8, 4, 4))


def test_training_is_refused():
    with pytest.raises(NotImplementedError, match="inference only"):
        tensorrt_engine.convert(rir.RiRLayer(8, 8), torch.zeros(1, 8, 4, 4), training=True)


@pytest.mark.parametrize(
    ("package", "reason"), [(None, "cannot be imported"), (SimpleNamespace(__version__="8.6.1"), "needs TensorRT 10")]
)
def test_absent_says_why(package, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    assert "CUDA device" in tensorrt_engine.absent(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reason in tensorrt_engine.absent(torch.device("cuda"))
