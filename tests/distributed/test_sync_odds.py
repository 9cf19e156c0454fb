"""Synchronized norms at the edges: extreme numbers, single values, nothing at all."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import rir_kernels as rir
from rir_kernels.common import switches
from tests.distributed.test_sync_parts import CLOSE
from tests.support.ranks import (
    assert_same,
    counted_gathers,
    of_all_ranks,
    one_step,
    settled,
    whole_of,
)

pytestmark = pytest.mark.xdist_group("distributed")  # processes of their own: not in two workers at once


def _norms_of_single_values():
    return nn.Sequential(nn.BatchNorm2d(4), rir.ConvBNAct(4, 4, 1))


def _odds_and_ends():
    rank = dist.get_rank()
    results = {}

    # every rank faces another mean, which is large beside the deviation
    x = 1e4 + rank + torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(rank))
    norm = rir.convert_sync_batchnorm(nn.BatchNorm2d(4, momentum=1.0))
    norm(x)
    results["large mean"] = x, norm.running_mean, norm.running_var

    for dtype in (torch.float16, torch.bfloat16):
        layer = rir.convert_sync_batchnorm(settled(rir.ConvBNAct(4, 6, 3), torch.float32))
        x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(rank)).to(dtype)
        layer.conv.to(dtype)
        results[dtype] = one_step(layer, [x], 1)

    # one value per channel here, more elsewhere
    norm = rir.convert_sync_batchnorm(settled(_norms_of_single_values()))
    x = torch.arange(8.0, dtype=torch.float64).view(2, 4, 1, 1).square().split([1, 1])[rank]
    results["one value"] = one_step(norm, [x], 1)

    # nobody has an image
    results["nothing"] = one_step(
        settled(rir.convert_sync_batchnorm(rir.RiRLayer(4, 6))), [torch.zeros(0, 4, 5, 5).double()], 1
    )

    # what is frozen before the norm decides on the exchange in backward: on a rank without images, which runs other
    # operators, as on the one that runs kernels
    results["frozen"] = []
    for trained in ((), ("weight",), ("bias",)):
        layer = rir.convert_sync_batchnorm(settled(rir.ConvBNAct(4, 6, 3, bias=True), torch.float32))
        layer.impl = "triton" if switches.interpreting() else "torch"
        for name, parameter in layer.conv.named_parameters():
            parameter.requires_grad_(name in trained)
        with counted_gathers() as gathers:
            layer(torch.randn(rank * 2, 4, 5, 5)).sum().backward()
        results["frozen"].append(gathers[0])

    # compiled, with a graph break at the norm
    layer = rir.convert_sync_batchnorm(settled(rir.ConvBNAct(4, 6, 3), torch.float32))
    layer.impl = "triton" if switches.interpreting() else "torch"
    twin = copy.deepcopy(layer)
    twin.compile(backend="aot_eager")
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(rank))
    results["compiled"] = one_step(layer, [x], 1), one_step(twin, [x], 1)

    # a group of one, evaluation, no gradients
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(rank)).double()
    alone = [dist.new_group([r]) for r in range(2)][rank]
    results["alone"] = one_step(rir.convert_sync_batchnorm(settled(nn.BatchNorm2d(4)), alone), [x], 1), x
    results["eval"] = one_step(rir.convert_sync_batchnorm(settled(nn.BatchNorm2d(4))).eval(), [x], 1), x
    twin = copy.deepcopy(rir.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), alone))
    results["copy shares the group"] = twin[0].process_group is alone
    with pytest.raises(TypeError, match="pickle"):
        torch.save(twin, "/dev/null")

    norm = rir.convert_sync_batchnorm(nn.BatchNorm2d(4)).double()
    (dweight,) = torch.autograd.grad(norm(x).square().sum(), norm.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dweight.sum().backward()
    return results


odds = of_all_ranks(2, _odds_and_ends)


def test_mean_that_is_large_beside_the_deviation(odds):
    x = torch.cat([rank["large mean"][0] for rank in odds]).double()
    var, mean = torch.var_mean(x, (0, 2, 3))
    for rank in odds:
        _, running_mean, running_var = rank["large mean"]
        # fp32 rounds the mean by 5e-4, whose square is nothing beside the variance; E[x^2] would be off by more than it
        torch.testing.assert_close(running_mean.double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(running_var.double(), var, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_beside_fp32_norms(odds, dtype):
    layer = settled(rir.ConvBNAct(4, 6, 3))
    layer.conv.to(dtype).double()
    x = [torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(2)]
    found, expected = whole_of([rank[dtype] for rank in odds]), one_step(layer, [torch.cat(x).double()], 1)
    # roundings of the activations and of their gradients, which go through sums of a hundred
    tolerance = 30 * torch.finfo(dtype).eps
    assert found["y"].dtype == dtype and found["bn.running_var"].dtype == torch.float32
    assert_same(found, expected, rtol=tolerance, atol=tolerance)


def test_one_value_on_a_rank(odds):
    x = torch.arange(8.0, dtype=torch.float64).view(2, 4, 1, 1).square()
    expected = one_step(settled(_norms_of_single_values()), [x], 1)
    assert_same(whole_of([rank["one value"] for rank in odds]), expected, **CLOSE[torch.float64])


def test_nothing_on_any_rank(odds):
    fresh = dict(settled(rir.RiRLayer(4, 6)).named_buffers())
    for rank in odds:
        found = rank["nothing"]
        assert found["y"].shape == (0, 6, 5, 5)
        assert torch.equal(found["bn.running_mean"], fresh["bn.running_mean"])
        assert torch.equal(found["bn.running_var"], fresh["bn.running_var"])
        assert found["bn.num_batches_tracked"] == 4
        assert all(not found[name].any() for name in found if name.startswith("gradient"))


def test_nothing_is_exchanged_for_what_is_frozen(odds):
    assert [rank["frozen"] for rank in odds] == [[1, 2, 2]] * 2


@pytest.mark.parametrize("case", ["alone", "eval"])
def test_a_batch_norm_bit_for_bit(odds, case):
    for rank in odds:
        found, x = rank[case]
        expected = one_step(settled(nn.BatchNorm2d(4)).train(case == "alone"), [x], 1)
        assert_same(found, expected, rtol=0, atol=0)


def test_compiled_with_a_graph_break(odds):
    for rank in odds:
        eager, compiled = rank["compiled"]
        assert_same(compiled, eager, rtol=0, atol=0)


def test_copies_share_the_group(odds):
    assert all(rank["copy shares the group"] for rank in odds)
