"""torch.compile of fused models: one graph, few recompiles, and changes made afterwards are seen.

In fp64: what the compiler sums in another order stays within surgery_helpers' tolerance.
"""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import rir_kernels as rir
from tests.pytorch.networks import BLOCKS, BasicBlock, twins
from tests.support.surgery_helpers import CLOSE, ShiftedNorm, randn, settle, step


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _no_warnings():
    """Neither from the compiler about our code nor from our code; torch's own deprecations are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0", RuntimeWarning)
        yield


def block():
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    return settle(nn.Sequential(BasicBlock(4, 6, 2, downsample)))


BLOCK_OPERATIONS = 3


@functools.cache
def _block_twins():
    return twins(block())


def assert_same_step(compiled, original, x):
    found, expected = step(compiled, x), step(original, x)
    for (name, value), ours in zip(expected.items(), found.values(), strict=True):
        torch.testing.assert_close(ours, value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_a_batch_that_is_marked_dynamic_compiles_once():
    fused, original = twins(block())
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for batch in (4, 6, 3):
        x = randn(batch, 4, 8, 8)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), original(x), **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    original = settle(BLOCKS[name]())
    fused, x = copy.deepcopy(original), randn(4, 4, 6, 6)
    rir.fuse_(fused)
    assert_same_step(torch.compile(fused, fullgraph=True, backend="eager"), original, x)


# torch 2.11 checks the guards of some modules, PreResUnit among them, only after a change of their __dict__
@pytest.mark.parametrize("make", [block, BLOCKS["PreResUnit"]], ids=["block", "PreResUnit"])
def test_fused_after_compiling_and_back(make):
    """A call runs the graph that was made of the class that the module has now."""
    model, graphs, ran = settle(make()), [], []
    original, x = copy.deepcopy(model), randn(4, 4, 8, 8)

    def backend(graph, _inputs):
        graphs.append(graph)
        number = len(graphs)
        return lambda *inputs: ran.append(number) or graph(*inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for change in (rir.unfuse_, rir.fuse_, rir.unfuse_, rir.fuse_):
        change(model)
        for _ in range(2):
            assert_same_step(compiled, original, x)
    assert ran == [1, 1, 2, 2, 1, 1, 2, 2]


def new_weights(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def hook(module):
    module.register_forward_hook(lambda _module, _inputs, output: 2 * output)


CHANGES = {
    "hook on a convolution": lambda m: hook(m[0].conv1),
    "hook on a ReLU": lambda m: hook(m[0].relu),
    "one norm in evaluation": lambda m: m[0].bn1.eval(),
    "new weights in place": new_weights,
    "own forward": lambda m: setattr(m[0].relu, "forward", lambda x: 2 * x),
    "own convolution": lambda m: setattr(m[0].conv1, "_conv_forward", lambda x, w, b: torch.conv2d(x, 2 * w, b, 2, 1)),
    "another class": lambda m: setattr(m[0].bn2, "__class__", ShiftedNorm),
}


@pytest.mark.parametrize("change", CHANGES)
# torch's own switches: by default hooks that come after compiling are not seen, on a fused model or another, nor does
# torch 2.11 look at a module's class again before something in its __dict__ has changed
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, use_recursive_dict_tags_for_guards=False)
def test_changes_after_compiling_are_seen(change):
    (fused, original), x = copy.deepcopy(_block_twins()), randn(4, 4, 8, 8)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    with torch.no_grad():
        for model in (compiled, original):
            model(x)
        for model in (fused, original):
            CHANGES[change](model)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), original(x), **CLOSE)
    torch.testing.assert_close(list(fused.buffers()), list(original.buffers()), **CLOSE)


@pytest.mark.interpreter
def test_the_kernels_are_ops_of_the_graph():
    (fused, original), x = twins(block()), randn(2, 4, 8, 8).float()
    rir.unfuse_(fused.float())
    rir.fuse_(fused, impl="triton")
    eager, graphs = copy.deepcopy(fused), []

    def backend(graph, _inputs):
        graphs.append(sum("rir_kernels.conv_bn_act" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    with torch.no_grad():
        # the same kernels run, but another order of three roundings updates the statistics in a graph
        assert torch.equal(compiled(x), eager(x))
        torch.testing.assert_close(list(fused.buffers()), list(eager.buffers()), rtol=4 * 2**-24, atol=0)
        assert graphs == [BLOCK_OPERATIONS]
        # fp32: outputs of order one to ten
        torch.testing.assert_close(compiled(x), original.float()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_inductor():
    fused, original = twins(block())
    compiled = torch.compile(fused, fullgraph=True)
    for batch in (4, 6, 3):
        assert_same_step(compiled, original, randn(batch, 4, 8, 8))


@pytest.mark.gpu
@pytest.mark.real_gpu("code that torch's compiler makes for it")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_on_a_gpu(mode):
    model = block().float().cuda()
    fused = copy.deepcopy(model)
    rir.fuse_(fused)
    compiled = torch.compile(fused, fullgraph=True, mode=mode)
    for seed in range(3):
        x = randn(4, 4, 8, 8, seed=seed).float().cuda()
        for m in (compiled, model):
            m.zero_grad()
            m(x).square().mean().backward()
    for ours, expected in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-2, atol=1e-3)  # TF32 where torch allows it
    for ours, expected in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-3)
