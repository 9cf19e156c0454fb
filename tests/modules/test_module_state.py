"""The state of RiRLayer, RiRBlock and ConvBNAct: names, copies, casts, counted batches, frozen parts."""

import copy

import pytest
import torch
from torch import nn

import rir_kernels as rir
from tests.support.helpers import conv_formula, double_precision, module_results, scrambled  # noqa: F401

# fp64, outputs and gradients of order one to a hundred: rounding stays below 1e-11, and a mistake is above 1e-3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def test_names():
    def keys(module):
        return list(module.state_dict())

    norm = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    assert keys(rir.RiRLayer(4, 6)) == ["weight", *norm]
    assert keys(rir.RiRLayer(4, 6, shortcut="projection")) == ["weight", *norm, "projection.weight"]
    assert keys(rir.ConvBNAct(4, 6, 3, bias=True)) == ["conv.weight", "conv.bias", *norm]
    block = rir.RiRBlock(4, 6, shortcut="projection", outer_streams="both")
    assert keys(block)[-2:] == ["projection.weight", "projection_t.weight"]
    assert keys(block)[:2] == ["layers.0.weight", "layers.0.bn.weight"]
    assert rir.RiRLayer(4, 6).projection is None


def test_initial_variance_is_he_with_the_packed_fan_in():
    layer = rir.RiRLayer(48, 96, stride=2, shortcut="projection", residual_fraction=0.25)
    for weight, fan_in in ((layer.weight, 48 * 9), (layer.projection.weight, 12)):
        # the sample variance of n normals has the relative deviation sqrt(2 / n); 5 of them, and the seed is fixed
        assert weight.var().item() == pytest.approx(2 / fan_in, rel=5 * (2 / weight.numel()) ** 0.5)


MODULES = {
    "layer": lambda: rir.RiRLayer(4, 6, stride=2, shortcut="projection", branch_scale=0.5),
    "block": lambda: rir.RiRBlock(4, 6, stride=2, outer_streams="both"),
    "unit": lambda: rir.ConvBNAct(4, 6, 3),
}
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


@modules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casts(make, dtype):
    module = scrambled(make())
    x = torch.randn(3, 4, 7, 5).to(dtype)
    y = copy.deepcopy(module).to(dtype)(x)
    assert y.dtype == dtype
    # parameters, inputs and every step are rounded: a dozen roundings of values of order one
    torch.testing.assert_close(y.double(), module(x.double()), rtol=0, atol=12 * torch.finfo(dtype).eps)


@modules
def test_channels_last(make):
    module, x = make(), torch.randn(3, 4, 7, 5)
    expected = module(x)
    assert expected.is_contiguous()
    module.to(memory_format=torch.channels_last)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        y = module(x.contiguous(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, expected, **CLOSE)


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


@modules
def test_every_batch_is_counted_once(make):
    module = make()
    for expected in (1, 2):
        module(torch.randn(3, 4, 7, 5))
        assert [int(bn.num_batches_tracked) for bn in norms(module)] == [expected] * len(norms(module))
    module(torch.randn(0, 4, 7, 5))  # an empty one too, as by torch
    module.eval()(torch.randn(3, 4, 7, 5))
    assert [int(bn.num_batches_tracked) for bn in norms(module)] == [3] * len(norms(module))


@modules
def test_a_frozen_norm_uses_and_keeps_its_statistics(make):
    module, x = scrambled(make()), torch.randn(3, 4, 7, 5)
    expected = module_results(copy.deepcopy(module).eval(), x)
    module.train()
    for bn in norms(module):
        bn.eval()
    for name, result in module_results(module, x).items():
        assert torch.equal(result, expected[name]), name
