"""What streams, CUDA graphs and determinism ask of the host's side, judged by the launches that reach the driver."""

import contextlib

import pytest
import torch

import rir_kernels as rir
from tests.support import emulation

pytestmark = pytest.mark.machine


@pytest.fixture
def step():
    """A training step of two layers, whose plans have been left; returns what it computed."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(rir.RiRLayer(8, 8, impl="triton", dtype=torch.bfloat16) for _ in range(2)))
    layers.to(memory_format=torch.channels_last)
    state = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    x = torch.randn(2, 8, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)

    def run():
        layers.load_state_dict(state)
        y = layers(x)
        return [
            y.detach(),
            *torch.autograd.grad(y.float().square().sum(), list(layers.parameters())),
            *layers.buffers(),
        ]

    for _ in range(2):
        run()
    return run


@contextlib.contextmanager
def host_calls(*names):
    """A list of the calls of these functions of torch, (name, launches made so far) each."""
    calls = []

    def noting(name, function):
        return lambda *args, **options: (
            calls.append((name, len(emulation.emulator.records))) or function(*args, **options)
        )

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            owner = torch.Tensor if name.startswith("Tensor.") else torch
            name = name.removeprefix("Tensor.")
            patch.setattr(owner, name, noting(name, getattr(owner, name)))
        yield calls


def test_every_launch_goes_to_the_current_stream(step, emulator):
    emulation.driver.stream = 7
    try:
        step()
    finally:
        emulation.driver.stream = 0
    assert len(emulator.records) > 10 and {record.stream for record in emulator.records} == {7}
    emulator.records.clear()
    step()
    assert {record.stream for record in emulator.records} == {0}


def test_the_host_reads_nothing_that_a_launch_has_computed(step, emulator):
    """It would wait for the device, which a capture into a CUDA graph refuses."""
    with host_calls("Tensor.item", "Tensor.tolist", "Tensor.cpu", "Tensor.numpy", "Tensor.__bool__", "Tensor.__float__",
                    "Tensor.__int__", "Tensor.nonzero") as calls:  # fmt: skip
        step()
    assert emulator.records and not calls


def test_a_plan_allocates_before_its_first_launch(step, emulator):
    """And never between two, so that memory is taken and given back in an order that does not depend on the device."""
    with host_calls("empty_strided") as calls:
        step()
    launches = len(emulator.records)
    # a forward and a backward of each of the two layers
    assert 0 < len({made for _, made in calls}) <= 4 < launches


def test_the_same_bytes_each_time_in_any_order_of_programs(step, emulator):
    first = step()
    for again in (step(), step()):
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with emulator.late(seed=5):
        late = step()
    assert all(torch.equal(one, other) for one, other in zip(first, late, strict=True))
