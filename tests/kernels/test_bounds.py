"""Nothing is written beyond the end of an allocation.

Within a tensor a store that a mask should have held back may be put right by the program that owns the place, which in
the interpreter always comes later; beyond the last row there is nobody.
"""

import pytest
import torch

from rir_kernels.common.spec import ConvBNActSpec

from .targets import TARGETS, ieee_fp32, rand  # noqa: F401 (an autouse fixture)

targets = pytest.mark.parametrize("target", [TARGETS[0], TARGETS[2]])
BEYOND, CANARY = 4096, 77  # elements behind each allocation, and what they hold


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Fresh tensors lie in larger memory, whose rest is looked at when the test is over."""
    empty, memories = torch.empty, []

    def guarding(allocate):
        def guarded(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            memory = empty(size + BEYOND, dtype=tensor.dtype, device=tensor.device).fill_(CANARY)
            memories.append((memory, size))
            return memory.as_strided(tensor.shape, tensor.stride())

        return guarded

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, guarding(getattr(torch, name)))
    yield
    assert memories
    for memory, size in memories:
        assert (memory[size:] == CANARY).all()


@targets
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_writes_nothing_beyond(target, stride):
    """Odd channels, which are stored by pointers, and images that no tile divides."""
    from rir_kernels.triton.launch import conv, wgrad

    spec = ConvBNActSpec((stride, stride), (1, 1))
    x, weight = rand((2, 5, 3, 5), target, seed=1), rand((9, 5, 3, 3), target, seed=2)
    z, _ = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
    ones = torch.ones(9, device=target[0])
    norm = dict.fromkeys(("mean", "var", "gamma", "beta"), ones)
    conv.conv_infer(x, weight, bias=None, residuals=(), spec=spec, **norm, save_z=True)
    conv.conv_data_grad(z, weight, shape=tuple(x.shape), spec=spec)
    wgrad.conv_weight_grad(z, x, kernel=(3, 3), spec=spec)


@targets
def test_a_norm_writes_nothing_beyond(target):
    from rir_kernels.triton.launch import batchnorm

    spec = ConvBNActSpec(post_norm=True)
    z = rand((2, 5, 3, 3), target, seed=1)
    statistics = batchnorm.bn_finalize(batchnorm.bn_stats(z), spec.eps)
    batchnorm.bn_running(statistics.mean, statistics.var, spec.eps)
    y = batchnorm.bn_apply(z, statistics, gamma=None, beta=None, residuals=[z], spec=spec)
    per_channel = {"mean": statistics.mean, "invstd": statistics.invstd, "gamma": None, "beta": None, "spec": spec}
    sums = batchnorm.bn_reduce(z, z, y, **per_channel)
    batchnorm.bn_apply_grad(z, z, y, sums, count=18, **per_channel, need_dres=True)
