"""What a plan hands to the driver, call by call, and what a launch does that may overlap the one ahead."""

import functools

import pytest
import torch
from triton.runtime.driver import driver

from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.inspect import waits_first
from rir_kernels.triton.launch import batchnorm, conv, wgrad
from rir_kernels.triton.plan.places import Slot, Unplannable
from rir_kernels.triton.plan.plan import record
from tests.kernels.targets import rand
from tests.support import emulation

pytestmark = pytest.mark.machine
BFLOAT16 = torch.device("cpu"), torch.bfloat16


def _hand_out_the_same_memory(monkeypatch):
    """From now on an allocation gets the memory that the last one of its size got."""
    memory = {}
    for name in ("empty", "empty_strided"):
        allocate = getattr(torch, name)

        def again(*size, allocate=allocate, **options):
            return memory.setdefault((allocate, str((size, options))), allocate(*size, **options))

        monkeypatch.setattr(torch, name, again)


def _running(mean, var):
    statistics = batchnorm.bn_running(mean, var, 1e-5)
    return statistics.mean, statistics.invstd


def _finalize(mean, m2, count, running_mean, running_var, *, momentum):
    moments = batchnorm.TileMoments(mean, m2, count)
    batchnorm.bn_finalize(moments, 1e-5, running_mean=running_mean, running_var=running_var, momentum=momentum)
    return ()


def test_a_plan_launches_on_the_current_stream(monkeypatch):
    tensors = torch.linspace(0.5, 2.0, 8), torch.ones(8)
    plan = record(_running, tensors)
    _hand_out_the_same_memory(monkeypatch)
    for stream in (0, 7, 9, 7):
        monkeypatch.setattr(driver.active, "get_current_stream", lambda _, stream=stream: stream)
        plan(tensors)
        assert emulation.emulator.records[-1].stream == stream


def test_a_plan_takes_the_numbers_and_the_addresses_of_the_call(monkeypatch):
    """Where all memory comes again but one number is another, and where the numbers come again."""
    tiles = torch.linspace(0.5, 2.0, 8)[None], torch.ones(1, 8), torch.full((1,), 4.0)
    first, second = [(torch.zeros(8), torch.ones(8)) for _ in range(2)]
    plan = record(functools.partial(_finalize, momentum=Slot(0)), (*tiles, *first))
    _hand_out_the_same_memory(monkeypatch)
    for (mean, var), momentum in ((first, 0.25), (first, 0.5), (second, 0.5)):
        mean.zero_()
        plan((*tiles, mean, var.fill_(1.0)), (momentum,))
        # exact: powers of two; m2 / (count - 1) is a third
        assert torch.equal(mean, momentum * tiles[0][0])
        torch.testing.assert_close(var, torch.full((8,), 1 - momentum + momentum / 3))


def test_a_plan_takes_no_view_that_is_not_aligned():
    """Its kernels are compiled for addresses that are multiples of 16 bytes."""
    with pytest.raises(Unplannable, match="not aligned"):
        record(lambda mean, var: _running(mean[1:], var[1:]), (torch.ones(9), torch.ones(9)))


def test_launches_that_may_overlap_wait_before_they_touch_memory(monkeypatch):
    monkeypatch.setenv("RIR_KERNELS_OVERLAP", "1")
    before = len(emulation.emulator.records)
    spec = ConvBNActSpec(padding=(1, 1))
    x = rand((1, 8, 4, 4), BFLOAT16, seed=1)
    weight = rand((8, 8, 3, 3), BFLOAT16, seed=2, channels_last=False)
    z, moments = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
    statistics = batchnorm.bn_finalize(moments, 1e-5)
    batchnorm.bn_running(statistics.mean, statistics.var, 1e-5)
    wgrad.conv_weight_grad(z, x, kernel=(3, 3), spec=spec)
    launched = {record.name: record.compiled.asm["ptx"] for record in emulation.emulator.records[before:]}
    assert len(launched) == 6
    assert [name for name, ptx in launched.items() if not waits_first(ptx)] == []
