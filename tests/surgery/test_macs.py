"""report.coverage.macs_share equals counts by hand, and counting leaves no trace."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import rir_kernels as rir
from rir_kernels import reference
from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import unchanged
from tests.support.surgery_models import with_forward

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
PIXELS = 2 * 6 * 6


def conv_bn():
    return nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))


class Net(nn.Module):
    """It has everything with multiply-adds, and everything that counting might change."""

    def __init__(self):
        super().__init__()
        self.fused = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8))
        self.dropout, self.linear, self.calls = nn.Dropout(0.5), nn.Linear(36, 5), 0

    def forward(self, x):
        self.calls += 1
        x = self.fused(x.mul_(1 + random.random() + np.random.rand()))
        x = self.grouped(self.fused[2](x)).flatten(2)  # (2, 8, 36)
        x = x @ x.mT @ x
        return self.linear(self.dropout(x)) + torch.rand(5)


MACS = {
    "fused": PIXELS * 8 * 4 * 9,
    "grouped": PIXELS * 8 * 4 * 9,
    "products": 2 * (2 * 8 * 36 * 8),
    "linear": 16 * 36 * 5,
}


def states(model):
    tensors = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), m.training) for m in model.modules()]
    _, numbers, position, *_ = np.random.get_state()
    generators = random.getstate(), numbers.tolist(), position, torch.get_rng_state().tolist()
    return {name: (i, t.tolist()) for name, (i, t) in tensors.items()}, hooks, generators, model.calls, X.tolist()


def test_share_and_no_trace():
    torch.manual_seed(0)
    model, seen = Net(), []
    model.grouped.eval()
    model.register_forward_hook(lambda *_: seen.append(1))
    model.fused[2].register_forward_pre_hook(lambda *_: seen.append(2))
    model.fused[2] = nn.ReLU()
    before = states(model)
    planned = fuse_(model, example_inputs=X, dry_run=True).coverage
    assert states(model) == before and not seen
    with torch.inference_mode():
        report = fuse_(model, example_inputs=(X,))
    assert states(model) == before and not seen
    again = fuse_(model, example_inputs=X).coverage
    # a quotient of whole numbers is rounded once
    share = pytest.approx(MACS["fused"] / sum(MACS.values()), rel=1e-15)
    assert planned.macs_share == report.coverage.macs_share == again.macs_share == share
    assert f"1 of 2 convolutions (50 %), {int(100 * report.coverage.macs_share)} % of the MACs; skipped" in str(report)
    assert report.to_dict()["coverage"]["macs_share"] == report.coverage.macs_share


def test_our_own_layers_are_fused_convolutions():
    """Packed or four convolutions, before or after fuse_: only the projection does not count as fused."""
    layer = rir.RiRLayer(4, 8, stride=2, shortcut="projection")
    naive = layer.to_reference()
    products = {"packed": 2 * 9 * 8 * 4 * 9, "projection": 2 * 9 * 4 * 2}
    share = pytest.approx(products["packed"] / sum(products.values()), rel=1e-15)
    for model in (layer, naive, naive):
        assert fuse_(model, example_inputs=X).coverage.macs_share == share
    unit = nn.Sequential(rir.ConvBNAct(4, 4, 3), reference.ConvBNAct(4, 4, 3, groups=2))
    coverage = fuse_(unit, example_inputs=X).coverage
    assert (coverage.operations, coverage.fused, coverage.convolutions) == (1, 1, 2)
    assert coverage.macs_share == pytest.approx(2 / 3, rel=1e-15)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operations_that_torch_fuses():
    """A child that torch.jit compiled, and attention, which torch runs as one operation in evaluation."""
    unit = conv_bn()
    compiled = torch.jit.script(copy.deepcopy(unit))
    assert fuse_(nn.Sequential(unit, compiled), example_inputs=X).coverage.macs_share == 0.5
    encoder = nn.TransformerEncoderLayer(36, 2, 72, batch_first=True)
    model = nn.Sequential(unit, nn.Flatten(2), encoder)
    products = {"q, k, v and output": 4 * 8 * 36 * 36, "attention": 2 * 2 * 4 * 4 * 36, "two layers": 2 * 8 * 36 * 72}
    convolution = PIXELS * 4 * 4
    share = convolution / (convolution + sum(products.values()))
    assert fuse_(model, example_inputs=X).coverage.macs_share == pytest.approx(share, rel=1e-15)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_convolution_that_is_called_several_times():
    Shared = with_forward(lambda m, x, y=None: m.block(x) if y is None else m.block(x) + y)
    unit = Shared()
    coverage = fuse_(nn.Sequential(unit, nn.Conv2d(4, 4, 3, padding=1), unit), example_inputs=X).coverage
    assert (coverage.operations, coverage.fused, coverage.convolutions) == (1, 1, 2)
    assert coverage.macs_share == pytest.approx(2 / 3, rel=1e-15)
    assert fuse_(Shared(), example_inputs=(X, X)).coverage.macs_share == 1.0
    assert fuse_(Shared(), example_inputs=(X, None)).coverage.macs_share == 1.0
    assert fuse_(nn.ReLU(), example_inputs=X).coverage.macs_share == 0.0


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ([X], TypeError, "example_inputs must be a tensor or a tuple of tensors, got list"),
        ((X, 1), TypeError, "got a tuple of Tensor, int"),
        (X[:, :3], RuntimeError, "channels"),
    ],
)
def test_wrong_inputs_change_nothing(inputs, error, text):
    model = Net()
    with unchanged(model), pytest.raises(error, match=text):
        fuse_(model, example_inputs=inputs)
    assert model.calls == 0


def test_nothing_is_compiled():
    compiled = []
    whole = torch.compile(conv_bn(), backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    assert fuse_(whole, example_inputs=X).coverage.macs_share == 1.0 and not compiled
