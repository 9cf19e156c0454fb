"""Plans: a recorded function does for other tensors what the function itself would do."""

import functools
import threading

import pytest
import torch

from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.launch import batchnorm, conv
from rir_kernels.triton.launch.runtime import observed
from rir_kernels.triton.plan.places import Slot, Unplannable
from rir_kernels.triton.plan.plan import record

from .targets import TARGETS, ieee_fp32, rand  # noqa: F401 (an autouse fixture)

targets = pytest.mark.parametrize("target", TARGETS)
SPEC = ConvBNActSpec(padding=(1, 1), shortcut_channels=4)
SHAPE = (2, 8, 4, 6)


def _train(x, weight, residual=None):
    """What a layer does in training, its statistics a temporary."""
    z, moments = conv.conv_train(x, weight, bias=None, residuals=() if residual is None else (residual,), spec=SPEC)
    statistics = batchnorm.bn_finalize(moments, SPEC.eps)
    y = batchnorm.bn_apply(z, statistics, gamma=None, beta=None, residuals=(), spec=SPEC)
    return y, None, statistics.invstd


def _assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b) and a.stride() == b.stride()


@targets
def test_repeats_for_other_tensors(target, poisoned):
    plan = record(_train, (rand(SHAPE, target, seed=1), rand((8, 8, 3, 3), target, seed=2), None))
    for seed in (3, 5):
        tensors = (rand(SHAPE, target, seed=seed), rand((8, 8, 3, 3), target, seed=seed + 1), None)
        _assert_same(plan(tensors), _train(*tensors))


@targets
def test_recorded_on_one_tensor_twice_repeated_on_two(target):
    """And the reverse: where a tensor lies is told by which argument it is, not by its address."""
    weight = rand((8, 8, 3, 3), target, seed=2)
    x, other = rand(SHAPE, target, seed=1), rand(SHAPE, target, seed=4)
    for recorded, repeated in (((x, weight, x), (x, weight, other)), ((x, weight, other), (x, weight, x))):
        _assert_same(record(_train, recorded)(repeated), _train(*repeated))


@targets
def test_slices_of_larger_tensors(target):
    wide = rand((2, 32, 4, 6), target, seed=1)
    weight = rand((8, 8, 3, 3), target, seed=2)
    plan = record(_train, (wide[:, 8:16], weight, wide[:, 16:24]))
    tensors = (wide[:, :8], weight, wide[:, 24:])
    _assert_same(plan(tensors), _train(*tensors))


@targets
def test_copies_are_part_of_a_plan(target, poisoned):
    """A contiguous weight is copied to the kernels' order, and rows of five channels to aligned ones: at every call."""

    def convolve(x, weight):
        return (conv.conv_train(x, weight, bias=None, residuals=(), spec=ConvBNActSpec(padding=(1, 1)))[0],)

    recorded, repeated = (
        (rand((2, 5, 4, 6), target, seed=s), rand((8, 5, 3, 3), target, seed=s + 1, channels_last=False))
        for s in (1, 3)
    )
    _assert_same(record(convolve, recorded)(repeated), convolve(*repeated))


@targets
def test_numbers_that_change_from_call_to_call(target):
    device = target[0]
    moments = batchnorm.bn_stats(rand(SHAPE, target, seed=1))

    def finalize(mean, m2, count, running_mean, running_var, *, momentum):
        batchnorm.bn_finalize(
            batchnorm.TileMoments(mean, m2, count), 1e-5,
            running_mean=running_mean, running_var=running_var, momentum=momentum,
        )  # fmt: skip
        return ()

    def running():
        return torch.zeros(8, device=device), torch.ones(8, device=device)

    tiles = (moments.mean, moments.m2, moments.count)
    plan = record(functools.partial(finalize, momentum=Slot(0)), (*tiles, *running()))
    for momentum in (0.1, 0.5):
        ours, theirs = running(), running()
        plan((*tiles, *ours), (momentum,))
        finalize(*tiles, *theirs, momentum=momentum)
        _assert_same(ours, theirs)
    assert not torch.equal(ours[0], torch.zeros_like(ours[0]))


@targets
def test_what_a_plan_cannot_repeat(target):
    x = rand(SHAPE, target, seed=1)
    with pytest.raises(Unplannable, match="aten::mul"):
        record(lambda x: (x * 2,), (x,))
    for function in (lambda x: (x,), lambda x: (x[:, :4],), lambda x: (torch.empty_like(x)[:, 4:],)):
        with pytest.raises(Unplannable, match="an output"):
            record(function, (x,))


@targets
def test_temporaries_do_not_overlap(target, poisoned):
    """The tiles of two images held at once in one workspace."""
    images = [rand(SHAPE, target, seed=seed) for seed in (1, 2)]

    def both(*images):
        moments = [batchnorm.bn_stats(image) for image in images]
        return tuple(batchnorm.bn_finalize(m, SPEC.eps).mean for m in moments)

    means = record(both, images)(images)
    _assert_same(means, both(*images))
    assert not torch.equal(*means)


@targets
def test_launches_are_observed_once_each_by_plan_and_without(target):
    """From another thread too; what is recorded launches nothing, and afterwards nothing is observed."""
    tensors = (rand(SHAPE, target, seed=1), rand((8, 8, 3, 3), target, seed=2), None)
    seen, recorded = [], []
    with observed(lambda *launch: recorded.append(launch)):
        plan = record(_train, tensors)
    runs = [lambda: _train(*tensors), lambda: plan(tensors), lambda: plan(tensors)]
    with observed(lambda kernel, programs, options: seen.append((kernel.fn.__name__, programs, dict(options)))):
        runs[0]()
        direct = seen.copy()
        for run in runs[1:]:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    for run in runs:
        run()
    assert recorded == [] and seen == 3 * direct
    assert [name for name, *_ in direct] == ["_conv_fwd_kernel", "_bn_finalize_fwd_kernel", "_bn_apply_fwd_kernel"]
