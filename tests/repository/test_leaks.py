"""However many steps: the process holds no more than after the first few."""

import gc

import pytest
import torch

import rir_kernels as rir
from tests.soak.resources import held
from tests.support.emulation import gpu
from tests.support.simulated_helpers import needs_compiler, simulated

WARM, FEW, MANY = 50, 200, 10_000
SLACK_MIB = 8  # the allocator's arenas; one leaked 64-byte object a step would be 0.6, one leaked tensor 5 and more
SLACK_OBJECTS = 100  # Python's own caches; a step that keeps one object keeps FEW at least
counts = pytest.mark.parametrize("steps", [FEW, pytest.param(MANY, marks=pytest.mark.long)])


def state(device):
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in objects)
    return held(device) | {"tensors": tensors, "objects": len(objects)}


def assert_nothing_is_kept(before, after):
    for name in ("files", "threads", "cuda_bytes", "tensors"):
        assert after[name] <= before[name], name
    assert after["objects"] <= before["objects"] + SLACK_OBJECTS
    assert after["mib"] <= before["mib"] + SLACK_MIB


ON_GPU = [pytest.mark.gpu, pytest.mark.real_gpu("an allocator that hands out the same addresses again")]


@counts
@pytest.mark.parametrize(
    "impl", ["torch", "reference", *(pytest.param(impl, marks=ON_GPU) for impl in ("triton", "hybrid"))]
)
def test_steps(impl, steps):
    """Training, evaluation with gradients, and calls that are refused."""
    device = torch.device("cpu") if impl in ("torch", "reference") else gpu()
    torch.manual_seed(0)
    model = torch.nn.Sequential(rir.RiRLayer(8, 8, impl=impl), rir.RiRBlock(8, 16, impl=impl, stride=2)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    x = torch.randn(2, 8, 6, 6, device=device)

    def step(number):
        model.train(number % 5 > 0)
        y = model(x.clone().requires_grad_())
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number % 7 == 0:
            with pytest.raises(ValueError):
                model(x[:, :5])

    for number in range(WARM):
        step(number)
    before = state(device)
    for number in range(steps):
        step(number)
    assert_nothing_is_kept(before, state(device))


@needs_compiler
@pytest.mark.interpreter  # where no GPU is; on one the steps above launch themselves
@counts
def test_repeated_launches(steps):
    """All that the launch path keeps: plans, addresses, tensor maps; on a driver that runs nothing."""
    found = simulated("leaks.py", steps)
    assert found["before"]["plans"] == found["after"]["plans"] > 0
    found["after"]["objects"] = (
        0  # addresses are kept and forgotten by dozens; what counts is that memory does not grow
    )
    assert_nothing_is_kept(**found)
