"""What the tests of fuse_ share: one comparison, a count of fused calls, and the changes made to a model afterwards.

Everything runs in fp64 on a CPU, where a fused and an unfused forward differ by rounding alone: sums of at most a few
hundred terms and a few norms stay near 1e-14 of a value of order one, and a mistake is above 1e-3. CLOSE leaves room
for the division by a small deviation.
"""

import contextlib
import copy

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from rir_kernels import record_calls, reference
from rir_kernels.surgery import fuse_

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@contextlib.contextmanager
def fused_calls(expected):
    """Within it the fused operation is run so many times."""
    with record_calls() as calls:
        yield calls
    fused = sum(call.fused for call in calls)
    assert fused == expected, f"{fused} fused calls, expected {expected}:\n{calls}"


def counting(convolutions):
    """A backend of torch.compile, which writes down how many convolutions each graph has: its are no calls."""
    from torch._dynamo.backends.debugging import aot_eager  # takes seconds, and few tests compile

    def backend(graph, inputs):
        convolutions.append(sum("conv2d" in str(node.target) for node in graph.graph.nodes))
        return aot_eager(graph, inputs)

    return backend


def units_skipped(report):
    """Without the convolutions and norms for which the entry of a module around them speaks as well."""
    return [item for item in report.skipped if item.within is None]


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def settle(model):
    """In fp64, with norms that are neither fresh nor alike, so that nothing cancels or hides."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.double().state_dict().values():
        if tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def step(model, *inputs, **options):
    """One forward and backward: {name: tensor} of outputs, gradients of inputs and parameters, and buffers."""
    inputs = [None if x is None else x.clone().requires_grad_() for x in inputs]
    options = {name: x.clone().requires_grad_() for name, x in options.items()}
    model.zero_grad()
    y = model(*inputs, **options)
    outputs = y if isinstance(y, tuple) else (y,)
    loss = sum((out * randn(*out.shape, seed=i)).sum() for i, out in enumerate(outputs, 10))
    if loss.requires_grad:
        loss.backward()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    found |= {f"input {i}": x.grad for i, x in enumerate([*inputs, *options.values()]) if x is not None and x.numel()}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(fused, original, *inputs, exact=False, calls=1, **options):
    """One step of both agrees in everything, the fused one in so many fused calls; exact: bit by bit."""
    with fused_calls(0):
        expected = step(original, *inputs, **options)
    with fused_calls(calls):
        found = step(fused, *inputs, **options)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = {"rtol": 0, "atol": 0} if exact else CLOSE
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


OPERATIONS = 3  # of a Net


class Net(nn.Module):
    """All that is fused on a CPU without other libraries: a stem (P1) and two layers of streams (P4)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.layers = nn.ModuleList([reference.RiRLayer(8, 8), reference.RiRLayer(8, 6, stride=2)])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        r, t = self.layers[0](x[:, :4], x[:, 4:])
        r, t = self.layers[1](r, t)
        return self.head(torch.cat([r, t], dim=1).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return settle(Net())


def pair_of(model):
    """(fused, original) with the same values."""
    fused = copy.deepcopy(model)
    assert len(fuse_(fused).replaced) == OPERATIONS
    return fused, model


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class SquaredReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x).square()


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return 3 * super().forward(x)


def _replace(kind):
    """The submodule as an instance of a subclass that computes something else, with the same parameters."""

    def change(module):
        module.__class__ = kind

    return change


def _override(module):
    module.forward = lambda x: 2 * x


def _prune(module):
    prune.l1_unstructured(module, "weight", amount=0.5)


# what stops a submodule from being bypassed; each gives other numbers, or is seen by the hook
ANY_CHANGES = {
    "forward hook": lambda module: module.register_forward_hook(lambda _module, _inputs, output: 2 * output),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],)),
    "backward hook": lambda module: module.register_full_backward_hook(lambda _module, grads, _: (2 * grads[0],)),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda _module, grads: (2 * grads[0],)),
    "own forward": _override,
}
CONV_CHANGES = ANY_CHANGES | {
    "parametrized": lambda conv: parametrize.register_parametrization(conv, "weight", Doubled()),
    "pruned": _prune,
    "subclass": _replace(ScaledConv),
}
NORM_CHANGES = ANY_CHANGES | {"subclass": _replace(ShiftedNorm)}
RELU_CHANGES = ANY_CHANGES | {"subclass": _replace(SquaredReLU)}
