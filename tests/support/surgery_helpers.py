"""Shared by the tests of fuse_: pairs of a fused and an unfused model, their comparison, and changes to modules.

Everything runs in fp64 on a CPU, where a fused and an unfused forward differ only by rounding: sums of at most a few
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

CLOSE, EXACT = {"rtol": 1e-10, "atol": 1e-10}, {"rtol": 0, "atol": 0}


@contextlib.contextmanager
def fused_calls(expected):
    """Asserts that the fused operation runs this many times within the context."""
    with record_calls() as calls:
        yield calls
    fused = sum(call.fused for call in calls)
    assert fused == expected, f"{fused} fused calls, expected {expected}:\n{calls}"


def counting(convolutions):
    """A backend of torch.compile that appends the number of convolutions of each graph to the list."""
    from torch._dynamo.backends.debugging import aot_eager  # takes seconds, and few tests compile

    def backend(graph, inputs):
        convolutions.append(sum("conv2d" in str(node.target) for node in graph.graph.nodes))
        return aot_eager(graph, inputs)

    return backend


def units_skipped(report):
    """The skipped entries, without the convolutions and norms that the entry of a module around them explains."""
    return [item for item in report.skipped if item.within is None]


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X = randn(2, 4, 6, 6)


def settle(model):
    """Casts the model to fp64 and randomizes its norms, so that no fault cancels out or is hidden."""
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
    """One step of both gives the same results, bit for bit if exact; the fused model makes this many fused calls."""
    with fused_calls(0):
        expected = step(original, *inputs, **options)
    with fused_calls(calls):
        found = step(fused, *inputs, **options)
    torch.testing.assert_close(found, expected, **(EXACT if exact else CLOSE))


def change_both(change, fused, original):
    """Applies the change to both models; modules that it makes get the same weights in both, in fp64."""
    for model in (fused, original):
        torch.manual_seed(1)
        change(model)
        model.double()


def assert_same_after(change, fused, original, *inputs, **options):
    """`assert_same` after `change_both`."""
    change_both(change, fused, original)
    assert_same(fused, original, *inputs, **options)


def assert_compiled_same(fused, original, *changes):
    """torch.compile makes one graph of the fused model, and the compiled model follows each change of both models."""
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), original(X), **CLOSE)
    for change in changes:
        change_both(change, fused, original)
        for _ in range(2):
            torch.testing.assert_close(compiled(X), original(X), **CLOSE)


def assert_change_is_noticed(change, original, before, *inputs):
    """Before fuse_ the change is refused with a reason; after fuse_ it leads to the bits of the unfused model.

    Returns how many operations could still be fused.
    """
    fused = copy.deepcopy(original)
    change(original)
    operations = 0
    if before:
        change(fused)
        report = fuse_(fused)
        assert report.skipped[0].name == "" and report.skipped[0].reason and type(fused) is type(original)
        operations = len(report.replaced)
    else:
        assert fuse_(fused).replaced
        change(fused)
    assert_same(fused, original, *inputs, exact=True, calls=operations)
    return operations


OPERATIONS = 3  # of a Net


class Net(nn.Module):
    """Everything that is fused on a CPU without other libraries: a stem (conv_bn_act) and two layers of streams."""

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


def pair_of(model, expected=OPERATIONS, **options):
    """(fused, original) with the same values; expected: the patterns of the fused operations, or their number."""
    fused = copy.deepcopy(model)
    report = fuse_(fused, **options)
    patterns = [item.pattern for item in report.replaced]
    assert (patterns if isinstance(expected, list) else len(patterns)) == expected, report
    return fused, model


def snapshot(model):
    """(classes and names of the attributes of all modules, {name: (identity, copy)} of parameters and buffers)"""
    state = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    return [(type(m), list(m.__dict__)) for m in model.modules()], state


def assert_unchanged(model, before):
    """Nothing in the model has changed since the snapshot."""
    classes, state = snapshot(model)
    assert classes == before[0] and list(state) == list(before[1])
    for name, (identity, value) in state.items():
        assert identity == before[1][name][0] and torch.equal(value, before[1][name][1]), name


@contextlib.contextmanager
def unchanged(model):
    """Asserts that nothing in the model changes within the context."""
    before = snapshot(model)
    yield
    assert_unchanged(model, before)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


# subclasses that compute something else with the same parameters
class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class SquaredReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x).square()


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return 3 * super().forward(x)


def double_output(module):
    module.register_forward_hook(lambda _module, _inputs, output: 2 * output)


# what keeps a submodule from being bypassed; each changes the numbers, or the hook sees it
ANY_CHANGES = {
    "forward hook": double_output,
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],)),
    "backward hook": lambda module: module.register_full_backward_hook(lambda _module, grads, _: (2 * grads[0],)),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda _module, grads: (2 * grads[0],)),
    "own forward": lambda module: setattr(module, "forward", lambda x: 2 * x),
}
CONV_CHANGES = ANY_CHANGES | {
    "parametrized": lambda conv: parametrize.register_parametrization(conv, "weight", Doubled()),
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", amount=0.5),
    "subclass": lambda conv: setattr(conv, "__class__", ScaledConv),
}
NORM_CHANGES = ANY_CHANGES | {"subclass": lambda norm: setattr(norm, "__class__", ShiftedNorm)}
RELU_CHANGES = ANY_CHANGES | {"subclass": lambda relu: setattr(relu, "__class__", SquaredReLU)}
