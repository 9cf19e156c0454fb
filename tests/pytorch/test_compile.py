"""torch.compile and torch.export of the modules on plain PyTorch: one graph, the same numbers, few recompiles."""

import copy
import os

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import rir_kernels as rir
from rir_kernels.common import warn
from rir_kernels.dispatch import choose

# fp32, outputs and gradients of order one to a hundred: AOTAutograd decomposes the norm and sums in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MODULES = {
    "layer": lambda: rir.RiRLayer(8, 8),
    "block": lambda: rir.RiRBlock(
        8, 12, stride=2, outer_shortcut="post_act", outer_streams="both", shortcut="projection"
    ),
    "unit": lambda: rir.ConvBNAct(8, 12, 3, bias=True),
}
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def packed(batch=4):
    return (torch.randn(batch, 8, 6, 6),)


def streams(batch=4):
    x = torch.randn(batch, 8, 6, 6)
    return x[:, :4], x[:, 4:]


def step(module, inputs):
    """Outputs, gradients and buffers of one training step."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = module(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((y * y).sum() for y in outputs).backward()
    return [
        *(y.detach() for y in outputs), *(x.grad for x in inputs), *(p.grad for p in module.parameters()),
        *(b.clone() for b in module.buffers()),
    ]  # fmt: skip


def assert_close(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@modules
def test_in_evaluation(make):
    module = make().eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = packed()
    torch.testing.assert_close(compiled(*x), module(*x), **CLOSE)


def test_the_functional_form():
    def function(x, weight):
        return rir.functional.conv_bn_act(x, weight, training=True, residual=x, residual_at="pre_norm", padding=1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, weight = packed()[0], torch.randn(8, 8, 3, 3)
    torch.testing.assert_close(compiled(x, weight), function(x, weight), **CLOSE)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(memory_format):
    layer = rir.RiRLayer(8, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = packed()[0].contiguous(memory_format=memory_format)
    assert compiled(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    layer = rir.RiRLayer(8, 8)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    if inside:
        call_compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    else:
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

        def call_compiled(x):
            with torch.autocast("cpu", torch.bfloat16):
                return compiled(x)

    x = packed()[0]
    ours, expected = call_compiled(x), call(x)
    assert ours.dtype == torch.bfloat16
    # two roundings to bf16 that may fall apart, of values up to 4
    torch.testing.assert_close(ours, expected, rtol=0, atol=2 * 4 * torch.finfo(torch.bfloat16).eps)


def test_autocast_may_come_and_go():
    """Each call takes what was compiled under its own autocast: availability is a constant, the state is none."""
    layer = rir.RiRLayer(8, 8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(layer, fullgraph=True, backend=counter), packed()[0]
    for _ in range(2):
        assert compiled(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(x).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert compiled(x).dtype == torch.float16
    assert counter.frame_count == 3


def test_use_impl_within_the_compiled_function():
    layer = rir.RiRLayer(8, 8)

    def call(x):
        with rir.use_impl("reference"):
            return layer(x)

    x = packed()[0]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x), **CLOSE)
    with torch.no_grad():  # compiled once more
        torch.testing.assert_close(compiled(x), call(x), **CLOSE)


def test_use_impl_counts_while_the_function_is_compiled():
    """Then the function keeps it; one within the function comes first."""
    layer, x, compiled = rir.RiRLayer(8, 8).eval(), packed()[0], []

    def backend(graph, inputs):
        compiled.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    def operators(function):
        """Of the only graph that calls under two implementations leave."""
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend=backend)
        for name in ("torch", "reference"):
            with rir.use_impl(name):
                function(x)
        (found,) = compiled
        compiled.clear()
        return found

    def inner(x):
        with rir.use_impl("reference"):
            return layer(x)

    found = operators(layer), operators(inner)
    layer.impl = "torch"
    expected = [operators(layer)]
    layer.impl = "reference"
    expected.append(operators(layer))
    assert found == tuple(expected) and expected[0] != expected[1]


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_the_kernels_are_one_graph_too(impl):
    layer = rir.RiRLayer(8, 8, impl=impl)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), packed(2)
    eager = copy.deepcopy(layer)
    assert_close(step(compiled, x), step(eager, x))


def test_what_a_device_lacks_is_found_while_compiling(monkeypatch):
    """Looked up by Python, not traced: neither the look-up nor the warning, which comes once."""

    def find(index):
        open(os.devnull).close()  # which the compiler cannot trace
        return f"no GPU {index}"

    monkeypatch.setattr(choose, "_find_missing_on", find)
    monkeypatch.setattr(warn, "_warned", set())

    def function(x):
        if missing := choose._missing_on(0):
            warn.warn_once(missing)
            return x + 1
        return x

    with pytest.warns(RuntimeWarning, match="no GPU 0") as caught:
        for batch in (2, 3):
            x = packed(batch)[0]
            assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), x + 1)
    assert len(caught) == 1
