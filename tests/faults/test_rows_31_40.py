"""Autocast, streams, threads, forks, graphs, compilers, transforms, and GPUs that are too small.

The number in a test's name is that of the fault in docs/faults.md.
"""

import copy
import functools
import threading
import types
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import rir_kernels as rir
from rir_kernels.common.device_tables import read_entries
from rir_kernels.triton.launch import tile_fallback
from rir_kernels.triton.tiling import conv_tiles, measured
from rir_kernels.triton.tiling.conv_cost import Problem
from rir_kernels.triton.tiling.conv_tiles import conv_config
from rir_kernels.triton.tiling.gpus import Gpu
from tests.functional.test_joining import C, halves
from tests.kernels.targets import TARGETS
from tests.kernels.test_ladder import _results as ladder_results
from tests.kernels.test_ladder import fresh, scarce  # noqa: F401 (fixtures, the first for every test)
from tests.pytorch.networks import OPERATIONS, images, resnet_twins
from tests.pytorch.test_autocast import call_within_autocast, cast_by_hand
from tests.pytorch.test_autocast_fused import _Infinite
from tests.pytorch.test_compile import MODULES as compile_modules
from tests.pytorch.test_compile import assert_close, packed, streams
from tests.pytorch.test_compile import step as compiled_step
from tests.pytorch.test_compile_fused import _block_twins, assert_same_step
from tests.pytorch.test_export import FORMS, exported
from tests.pytorch.test_func import TRANSFORMS
from tests.pytorch.test_graphs import CLOSE as CLOSE_ON_GPU
from tests.pytorch.test_graphs import assert_unchanged, state
from tests.repository.test_imports import run_python
from tests.support.emulation import gpu
from tests.support.helpers import make_call, output_gradient, run
from tests.support.surgery_helpers import CLOSE, randn

conv_bn_act = rir.functional.conv_bn_act
# what a call runs in: the kernels only where they run on CPU tensors
cpu_impls = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@cpu_impls
@pytest.mark.parametrize("training", [True, False])
def test_row_31_autocast_casts_what_is_convolved_and_nothing_else(impl, training):
    """Bit for bit a call whose convolution was cast by hand; gradients and statistics stay in fp32."""
    tensors, options = make_call(
        dtype=torch.float32, residuals=(3,), bias=True, padding=1, training=training, batch=2, size=(3, 4)
    )  # fmt: skip
    dy = output_gradient(tensors, options)
    expected = run(cast_by_hand(torch.float16, impl=impl), tensors, options, dy)
    ours = run(call_within_autocast(torch.float16, impl=impl), tensors, options, dy)
    assert ours["y"].dtype == torch.float16
    for name, result in ours.items():
        assert torch.equal(result, expected[name]), name
        assert name == "y" or result.dtype == torch.float32


def test_row_31_autocast_disabled_and_nested():
    """The innermost autocast decides, and none leaves anything behind."""
    tensors, options = make_call(dtype=torch.float32, training=True)
    plain = run(conv_bn_act, tensors, options)["y"]
    assert torch.equal(run(call_within_autocast(enabled=False), tensors, options)["y"], plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(call_within_autocast(enabled=False), tensors, options)["y"], plain)
        assert run(call_within_autocast(torch.float16), tensors, options)["y"].dtype == torch.float16
        assert run(conv_bn_act, tensors, options)["y"].dtype == torch.bfloat16
    assert torch.equal(run(conv_bn_act, tensors, options)["y"], plain)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_row_32_infinite_gradients_reach_the_scaler(impl):
    """They are neither clamped nor lost: the step is skipped, the scale halved, and the next step is taken."""
    model = torch.nn.Sequential(rir.ConvBNAct(4, 4, 3), rir.ConvBNAct(4, 4, 1)).to(memory_format=torch.channels_last)
    for unit in model:
        unit.impl = impl
    x, scaler = randn(2, 4, 4, 4).float(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(list(model.parameters()))

    def train(spoil):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y = model(x)
        scaler.scale(spoil(y).float().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    train(_Infinite.apply)
    assert scaler.get_scale() == 2.0**9
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value) and not parameter.grad.isfinite().all()
    train(lambda y: y)
    assert scaler.get_scale() == 2.0**9
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert not torch.equal(parameter, value) and parameter.isfinite().all()


def test_row_33_a_plan_is_bound_to_the_current_stream(monkeypatch):
    """What is repeated is launched on the stream of this call, not on that of the call it was recorded in."""
    from rir_kernels.triton.plan import compiled, plan

    class Launch(compiled.CompiledLaunch):
        def __init__(self):
            pass

        def at(self, addresses, scalars, stream):
            return functools.partial(launched.append, (stream, *addresses))

    launched, current = [], [0]
    driver = types.SimpleNamespace(get_current_stream=lambda device: current[0], get_current_device=lambda: 0)
    monkeypatch.setattr(plan, "driver", types.SimpleNamespace(active=driver))
    repeated, x = plan.Plan(torch.device("cpu"), [Launch()], [], [0], [], 0), torch.ones(1)
    repeated._runs_steps = False
    for stream in (7, 9, 7):
        current[0] = stream
        repeated([x])
    assert launched == [(stream, x.data_ptr()) for stream in (7, 9, 7)]


@pytest.mark.gpu
@pytest.mark.real_gpu("streams that run at once")
@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_row_33_two_streams(impl):
    """Each call waits for what is ahead on its own stream, and shares no scratch memory with the other's."""
    unit = rir.ConvBNAct(8, 8, 3, impl=impl, device="cuda").to(memory_format=torch.channels_last)
    units = [copy.deepcopy(unit) for _ in range(2)]
    sources = [randn(16, 8, 16, 16, seed=i).float().cuda() for i in range(2)]
    sources = [x.contiguous(memory_format=torch.channels_last) for x in sources]

    def results(unit, x):
        x = x.requires_grad_()
        y = unit(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *unit.parameters()])]

    expected = [results(copy.deepcopy(unit), x.clone()) for x in sources]
    side = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(250):  # all but the first by their plans
        found = []
        for stream, unit, x in zip(side, units, sources, strict=True):
            with torch.cuda.stream(stream):
                late = torch.full_like(x, float("nan"))
                torch.cuda._sleep(10**7)  # some milliseconds, in which a launch elsewhere would read the NaN
                late.copy_(x)
                found.append(results(unit, late))
        torch.cuda.synchronize()
        for ours, golden in zip(found, expected, strict=True):
            for one, other in zip(ours, golden, strict=True):
                assert torch.equal(one, other)


def _on_threads(count, function):
    """[function(0), ...] from as many threads, which start together."""
    barrier, results, errors = threading.Barrier(count), [None] * count, []

    def body(index):
        try:
            barrier.wait(60)
            results[index] = function(index)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    return results


# the interpreter has one place for the program that it runs: kernels in threads are for a GPU
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def test_row_34_threads_compute_what_one_does(impl):
    """8 threads, 256 forwards and backwards through one module: the same bits as one after the other."""
    device = "cpu" if impl == "torch" else gpu()
    unit = rir.RiRLayer(8, 8, impl=impl, device=device).eval()  # in training they would share the statistics

    def step(index):
        x = randn(4, 8, 8, 8, seed=index).float().to(device).requires_grad_()
        results = []
        for _ in range(32):
            y, mine = unit(x), copy.deepcopy(unit).train()
            loss = y.square().sum() + mine(x).square().sum()
            gradients = torch.autograd.grad(loss, [x, *unit.parameters(), *mine.parameters()])
            results += [y, *gradients, *mine.buffers()]
        return results

    serial = [step(index) for index in range(8)]
    for found, expected in zip(_on_threads(8, step), serial, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_row_34_configurations_are_looked_up_once(tmp_path, monkeypatch):
    """8 threads that need a tile at the same moment get the same one, from a file that is read once."""
    read = []

    def slowly(path, *args, **options):
        read.append(path)
        threading.Event().wait(0.05)  # as a disk may be, with the others on its heels
        return read_entries(path, *args, **options)

    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    monkeypatch.setattr(measured, "read_entries", slowly)
    (tmp_path / "made-up-gpu-9.json").write_text("{")
    problem, gpu = Problem(2, 4, 4, 8, 8, (3, 3), 4, (1, 1)), Gpu(name="Made-up GPU 9")
    measured._load.cache_clear()
    conv_tiles._chosen.cache_clear()
    try:
        with pytest.warns(UserWarning, match="is ignored, tiles are chosen by rule") as warned:
            tiles = _on_threads(8, lambda index: conv_config(problem, True, gpu))
    finally:
        measured._load.cache_clear()
    assert len(set(tiles)) == 1 and len(read) == 1 and len(warned) == 1


def test_row_35_a_forked_process_goes_on_after_an_import():
    """Neither import nor calls on a CPU start CUDA, so that a child may; and it computes the same bits."""
    code = """
import os, torch
torch.set_num_threads(1)  # a fork keeps no threads
import rir_kernels as rir
layer, x = rir.RiRLayer(4, 6), torch.randn(2, 4, 5, 5)
expected = layer.eval()(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(layer(x), expected) and not torch.cuda._is_in_bad_fork() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.cuda.is_initialized())
"""
    assert run_python(code) == "0 False\n"


@pytest.mark.gpu
@pytest.mark.real_gpu("CUDA in a process and its fork")
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_row_35_a_fork_after_cuda_has_started(impl):
    """torch's own error in the child, and the parent goes on."""
    code = f"""
import os, torch
import rir_kernels as rir
layer, x = rir.RiRLayer(8, 8, device="cuda", impl={impl!r}), torch.randn(2, 8, 5, 5)
expected = layer.eval()(x.cuda())
child = os.fork()
if child == 0:
    try:
        layer(x.cuda())
    except RuntimeError as error:
        os._exit(0 if "Cannot re-initialize CUDA in forked subprocess" in str(error) else 2)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(layer(x.cuda()), expected))
"""
    assert run_python(code) == "0 True\n"


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_row_36_what_cannot_be_captured_says_so(impl, monkeypatch):
    """momentum=None reads a counter on the host: RuntimeError during a capture, and nothing has changed."""
    unit = rir.ConvBNAct(3, 4, 3, momentum=None, impl=impl)
    unit(images(dtype=torch.float32))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = state(unit)
    with pytest.raises(RuntimeError, match="momentum=None reads the number of batches on the host"):
        unit(images(dtype=torch.float32))
    assert_unchanged(unit, before)
    unit.eval()(images(dtype=torch.float32))  # where nothing is read
    unit.bn.momentum = 0.1
    unit.train()(images(dtype=torch.float32))


@pytest.mark.gpu
@pytest.mark.real_gpu("CUDA graphs")
@pytest.mark.parametrize("impl", ["triton", "hybrid"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_row_36_capture_by_hand(impl, warm):
    """Replays are eager calls. Cold: what is compiled during the capture can be our own, cuDNN's plans cannot."""
    if impl == "hybrid" and not warm:
        pytest.skip("the vendor's library makes its handle and its plan outside of captures")
    unit = rir.ConvBNAct(3, 24 if warm else 40, 3, impl=impl, device="cuda")  # a width of its own is not compiled yet
    eager, x = copy.deepcopy(unit), images().float().cuda()
    before = state(unit)
    with rir.preserved_statistics(unit), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3 * warm):
                unit(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = unit(x)
    assert_unchanged(unit, before)
    for seed in (1, 2):
        x.copy_(images(seed=seed))
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(y, eager(x.clone()), **CLOSE_ON_GPU)
    for ours, expected in zip(unit.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE_ON_GPU)


@pytest.mark.parametrize(("name", "inputs"), [("layer", packed), ("layer", streams), ("block", streams)])
def test_row_37_modules_are_one_graph(name, inputs, fresh_compiler):
    """fullgraph, and at most one recompile when the batch changes."""
    module = compile_modules[name]()
    eager = copy.deepcopy(module)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for batch in (4, 6, 3):
        module.zero_grad(), eager.zero_grad()
        x = inputs(batch)
        assert_close(compiled_step(compiled, x), compiled_step(eager, x))
    assert counter.frame_count <= 2  # the second with a symbolic batch


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_row_37_fused_models_are_one_graph(training, fresh_compiler):
    """fullgraph, at most one recompile when the batch changes, and no warnings."""
    twin = resnet_twins() if training else copy.deepcopy(_block_twins())
    fused, original = (model.train(training) for model in twin)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for batch in (4, 6, 3):
        if training:
            assert_same_step(compiled, original, images(batch))
            continue
        x = randn(batch, 4, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), original(x), **CLOSE)
    assert counter.frame_count <= 2  # the second with a symbolic batch


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("inputs", [packed, streams])
@pytest.mark.parametrize("training", [True, False])
def test_row_38_modules_are_exported(strict, inputs, training, fresh_compiler):
    """docs/inference.md says yes: another batch gives the same, and the statistics move."""
    layer = rir.RiRLayer(8, 8).train(training)
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(
        layer, inputs(), dynamic_shapes={"x": batch} if inputs is packed else {"x": batch, "t": batch}, strict=strict
    )
    expected = copy.deepcopy(layer)
    exported = program.module()
    x = inputs(5)
    # fp32, outputs of order one to ten
    for ours, theirs in zip(exported(*x), expected(*x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for name, buffer in exported.named_buffers():  # in training they were updated, the counter too
        torch.testing.assert_close(buffer, expected.get_buffer(name), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg", "ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_row_38_fused_models_are_exported(training, strict, form, fresh_compiler):
    """docs/inference.md says yes: as it is, decomposed and reloaded, in both modes."""
    program, original = exported(training, strict)
    if form == "as it is":
        assert sum("conv2d" in str(node.target) for node in program.graph.nodes) == OPERATIONS
    module, expected, x = FORMS[form](program).module(), copy.deepcopy(original), images(5)
    module.load_state_dict(original.state_dict(), strict=False)  # a program's own state is trained by its modules
    torch.testing.assert_close(module(x), expected(x), **CLOSE)
    buffers = dict(module.named_buffers())
    # what evaluation does not read may be left out: the counters
    assert set(buffers) == {name for name, _ in expected.named_buffers() if training or name in buffers}
    for name, buffer in buffers.items():  # in training they were updated, the counter too
        torch.testing.assert_close(buffer, expected.get_buffer(name), **CLOSE)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func's own use of it
def test_row_39_transforms_of_streams():
    """torch.func's wrappers have no memory to compare; the numbers are those of the packed call."""
    layer = rir.RiRLayer(2 * C, 6).double().eval()
    batches = torch.randn(3, 2, 2 * C, 5, 3, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def pair(x):
        return torch.cat(layer(*halves(x)), dim=1)

    # fp64 sums of a few dozen terms, vectorized in another order
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.vmap(pair)(batches), torch.vmap(layer)(batches), **close)
    for ours, together in zip(
        torch.func.jvp(pair, (batches[0],), (batches[1],)),
        torch.func.jvp(layer, (batches[0],), (batches[1],)),
        strict=True,
    ):
        torch.testing.assert_close(ours, together, **close)

    def pair_loss(parameters):
        return torch.cat(torch.func.functional_call(layer, parameters, halves(batches[0])), dim=1).sum()

    def packed_loss(parameters):
        return torch.func.functional_call(layer, parameters, (batches[0],)).sum()

    ours, together = torch.func.grad(pair_loss)(parameters), torch.func.grad(packed_loss)(parameters)
    for name, expected in together.items():
        torch.testing.assert_close(ours[name], expected, **close)
    stacked = {name: torch.stack([p, 2 * p]).detach() for name, p in parameters.items()}
    torch.testing.assert_close(torch.vmap(pair_loss)(stacked), torch.vmap(packed_loss)(stacked), **close)


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("impl", ["triton", "hybrid"])
@pytest.mark.interpreter
def test_row_39_the_kernels_refuse_transforms(impl, kind):
    """NotImplementedError where the kernels were asked for by name."""
    unit = rir.ConvBNAct(3, 4, 3, impl=impl).eval()
    with pytest.raises(NotImplementedError, match=r"no rules for the transforms of torch\.func"):
        TRANSFORMS[kind](unit, images(dtype=torch.float32))


@pytest.mark.parametrize("stride", [2, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("target", TARGETS[:1] + TARGETS[2:3])
def test_row_40_a_smaller_tile_gives_the_same_and_is_kept(target, stride, scarce):  # noqa: F811 (a fixture)
    """OutOfResources: the next tile down the ladder, the same numbers, one warning, and no second try."""
    from rir_kernels.triton.launch import runtime

    with pytest.warns(RuntimeWarning, match=r"needs \d+ of shared memory, and this GPU has 24576") as warned:
        ours = ladder_results(target, stride)
    assert len([warning for warning in warned if "rir_kernels" in str(warning.message)]) == 1
    names = {name for name, _, _ in scarce}
    refused = {name for name, _, ran in scarce if not ran}
    assert refused == names and len(names) == 2 + (stride == 2)  # every kernel met the ladder

    steps = scarce.copy()
    scarce.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rir_kernels")
        again = ladder_results(target, stride)
    assert scarce == [step for step in steps if step[2]]  # what was refused is not tried again
    with runtime.intercepted(lambda kernel, programs, *args, **options: kernel[(programs,)](*args, **options)):
        tile_fallback._kept.clear()
        plenty = ladder_results(target, stride)
    for one, other, golden in zip(ours, again, plenty, strict=True):
        assert torch.equal(one, other) and torch.equal(one, golden)
