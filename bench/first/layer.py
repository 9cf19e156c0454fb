"""One layer's training step in every way that it can be launched: all must give the same bits.

By recorded plans, as eager calls run, and without them; some steps with an optimizer; replayed by a CUDA graph; with
launches that overlap the one ahead.
"""

import dataclasses
import os
from unittest import mock

import torch

import rir_kernels as rir
from bench.cases.case import random_input
from bench.measure import timing
from rir_kernels.backends.plans import Kinds
from rir_kernels.common.tracing import no_replay
from rir_kernels.dispatch import plan_cache
from rir_kernels.triton.shapes import Shape

# the running statistics are updated by a kernel in plans, by torch's operators without: three roundings, in two orders
ROUNDINGS = 4 * 2**-24


def run(journal, machine, _seconds):
    shape = machine.sized(Shape(96, 96, 32))
    if machine.dry:  # nine taps would take the interpreter nine times as long
        shape = dataclasses.replace(shape, kernel=1)
    journal.take("by plan and without", lambda: _compare(_Layer(shape, machine), _Layer(shape, machine, plans=False)))
    journal.take(f"{machine.steps} steps", lambda: _steps(shape, machine))
    journal.take("in a CUDA graph", lambda: _graph(shape, machine))
    journal.take("overlapping", lambda: _overlapping(shape, machine))


class _Layer:
    """A layer with its input and output gradient, the same for every instance."""

    def __init__(self, shape, machine, *, plans=True):
        torch.manual_seed(0)
        self.module = rir.RiRLayer(shape.c_in, shape.c_out, kernel_size=shape.kernel, impl="triton").to(
            machine.device, machine.dtype, memory_format=torch.channels_last
        )
        self.module.bn.float()
        self._plans = plans
        inputs = (shape.batch, shape.c_in, shape.size, machine.dtype, machine.device)
        self._x = random_input(*inputs).requires_grad_()
        self._dy = random_input(*inputs, seed=1)

    def step(self) -> dict[str, torch.Tensor]:
        """Output and gradients of one training step."""
        if not self._plans:
            with no_replay():
                return self._step()
        return self._step()

    def _step(self):
        parameters = dict(self.module.named_parameters())
        y = self.module(self._x)
        gradients = torch.autograd.grad(y, (self._x, *parameters.values()), self._dy)
        return {"y": y.detach(), **dict(zip(("x", *parameters), gradients, strict=True))}

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.module.state_dict().items()}


def _compare(ours, theirs):
    """Of the second step: the first one records the plan."""
    results = [[layer.step(), layer.step()][1] for layer in (ours, theirs)]
    plans = sum(plan is not None for plan in plan_cache._planned.values())
    if not plans:
        return {"status": "failed", "error": "no plan was recorded"}
    return _same(*results, ours.state(), theirs.state()) | {"plans": plans}


def _same(found, expected, state=None, expected_state=None):
    wrong = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    for name, tensor in (expected_state or {}).items():
        if not torch.allclose(state[name].double(), tensor.double(), rtol=ROUNDINGS, atol=ROUNDINGS):
            wrong.append(name)
    return {"status": "failed", "error": f"other values of {', '.join(wrong)}"} if wrong else {"same": len(expected)}


def _steps(shape, machine):
    layers = [_Layer(shape, machine, plans=plans) for plans in (True, False)]
    for layer in layers:
        optimizer = torch.optim.SGD(layer.module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(machine.steps):
            for parameter, gradient in zip(layer.module.parameters(), list(layer.step().values())[2:], strict=True):
                parameter.grad = gradient
            optimizer.step()
    parameters = [{name: p.detach() for name, p in layer.module.named_parameters()} for layer in layers]
    return _same(*parameters, layers[0].state(), layers[1].state())


def _graph(shape, machine):
    layer = _Layer(shape, machine)
    expected = layer.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.step()
    for _ in range(3):
        graph.replay()
    timing.synchronize(machine.device)
    return _same(captured, expected) | {"graph_ms": timing.device_ms(graph.replay, machine.calls)}


def _overlapping(shape, machine):
    """Plans are kept with the launches that they were recorded with: here they are recorded again."""
    expected = [_Layer(shape, machine).step() for _ in range(2)][1]
    with Kinds.apart(), mock.patch.dict(os.environ, RIR_KERNELS_OVERLAP="1"):
        layer = _Layer(shape, machine)
        found = [layer.step() for _ in range(2)][1]
        return _same(found, expected) | {"eager_ms": timing.device_ms(layer.step, machine.calls)}
