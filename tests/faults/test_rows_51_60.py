"""Copies, surgery, checkpointing, DDP, hidden waits, interrupts, and bf16 in the interpreter.

The number in a test's name is that of the fault in docs/faults.md.
"""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop

import rir_kernels as rir
from bench.measure import timing, tune
from models.quantized import quantize_
from rir_kernels import reference
from rir_kernels.autograd import registered_op
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.dispatch import preference
from rir_kernels.surgery import fuse, fuse_, unfuse_
from rir_kernels.triton.shapes import Shape
from rir_kernels.triton.tiling import measured
from tests.bench.test_tune import DEVICE
from tests.distributed.test_wrappers import SIZES
from tests.distributed.test_wrappers import _state as distributed_state
from tests.distributed.test_wrappers import images as distributed_images
from tests.distributed.test_wrappers import model as distributed_model
from tests.modules.test_module_state import MODULES
from tests.pytorch.networks import ResNet, images, resnet, resnet_twins
from tests.pytorch.test_training import assert_close_state, checkpointed_step, regions
from tests.support.helpers import in_fp64, module_results, scrambled
from tests.support.ranks import assert_same as assert_same_tensors
from tests.support.ranks_of_rows import WRAPPED, of_the_ranks
from tests.support.refusals import call_arguments, call_refused
from tests.support.surgery_helpers import (
    CLOSE,
    Doubled,
    ShiftedNorm,
    X,
    assert_same,
    assert_unchanged,
    fused_calls,
    net,
    randn,
    settle,
    snapshot,
)
from tooling import files

distributed = pytest.mark.xdist_group("distributed")  # processes of their own: not in two workers at once


@pytest.fixture(scope="module")
def ranks():
    return of_the_ranks()


@pytest.fixture
def fp64():
    with in_fp64():
        yield


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_row_51_copies_are_equal_and_independent(make, duplicate, fp64):
    """Same bits, and what happens to a copy stays there."""
    module, x = scrambled(make()), torch.randn(3, 4, 7, 5)
    twin = duplicate(module)
    ours, theirs = module_results(twin, x), module_results(module, x)
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), name
    before = copy.deepcopy(module.state_dict())
    twin(x)
    for p in twin.parameters():
        nn.init.zeros_(p)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_row_51_a_shallow_copy_shares_the_weights():
    """copy.copy: the same submodules, and a class of its own."""
    fused, _ = resnet_twins()
    twin = copy.copy(fused)
    assert twin.conv1 is fused.conv1 and torch.equal(twin.eval()(images()), fused.eval()(images()))
    rir.unfuse_(twin)
    assert type(twin) is ResNet and type(fused) is not ResNet


def _outputs(rank, model, x, results):
    results.put((rank, [type(m).__name__ for m in model.modules()], model(x).tolist()))


def test_row_51_a_spawned_process_gets_the_fused_model():
    """multiprocessing by spawn: the same classes and outputs there."""
    fused, _ = resnet_twins()
    x = images()
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_outputs, args=(7, fused.eval().requires_grad_(False), x, results))
    process.start()
    rank, classes, y = results.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0 and rank == 7
    assert classes == [type(m).__name__ for m in fused.modules()]
    # another process may sum in another order, of other threads: outputs of order one to ten
    torch.testing.assert_close(torch.tensor(y, dtype=x.dtype), fused(x), **CLOSE)


# 52: what fuse_ is not for


def _in_the_root():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


class _Own(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


def _changed(change):
    def make():
        model = settle(nn.Sequential(_in_the_root(), reference.RiRLayer(4, 4)))
        change(model)
        return model

    return make


def _shared():
    layer = settle(reference.RiRLayer(4, 4))
    return nn.Sequential(layer, layer)


def _quantized():
    return quantize_(settle(nn.Sequential(_in_the_root(), _in_the_root()))).eval()


# (model, names that are fused, names that are skipped and a word of the reason)
OBSTACLES = {
    "the root itself": (lambda: settle(_in_the_root()), [""], {}),
    "shared": (_shared, ["0"], {}),
    "hooked": (_changed(lambda m: m[0][1].register_forward_hook(lambda *_: None)), ["1"], {"0": "hook"}),
    "hooked layer": (_changed(lambda m: m[1].bn_t.register_forward_hook(lambda *_: None)), ["0"], {"1": "hook"}),
    "parametrized": (
        _changed(lambda m: parametrize.register_parametrization(m[0][0], "weight", Doubled())), ["1"],
        {"0": "parametriz"},
    ),
    "subclass of a norm": (_changed(lambda m: setattr(m[0][1], "__class__", ShiftedNorm)), ["1"], {"0": "ShiftedNorm"}),
    "subclass of a container": (_changed(lambda m: setattr(m[0], "__class__", _Own)), ["0", "1"], {}),
    "fused already": (_changed(lambda m: fuse_(m)), [], {"0": "already fused", "1": "already fused"}),
    "modes that differ": (_changed(lambda m: m[1].bn_t.eval()), ["0"], {"1": "mode"}),
    "one norm in evaluation": (_changed(lambda m: m[0][1].eval()), ["0", "1"], {}),
    "quantized": (_quantized, [], {"0": "Conv2d", "1": "Conv2d"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", OBSTACLES)
def test_row_52_what_is_odd_is_reported_and_left_whole(kind):
    """Listed as replaced, or as skipped with the reason; what is skipped keeps its class, and all compute alike."""
    make, fused, skipped = OBSTACLES[kind]
    model, original = make(), make()
    original.load_state_dict(model.state_dict())
    before = {name: type(module) for name, module in model.named_modules()}
    report = fuse_(model)
    assert sorted({item.name for item in report.replaced}) == fused
    for name, word in skipped.items():
        reasons = [item.reason for item in report.skipped if item.name == name]
        assert any(word in reason for reason in reasons), (name, reasons)
    for name, module in model.named_modules():
        assert (type(module) is not before[name]) == (name in fused), name
    found, expected = model(X), original(X)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(list(model.buffers()), list(original.buffers()), **CLOSE)


def test_row_52_on_the_meta_device():
    """Fused where it has no memory yet, right when it gets some."""
    with torch.device("meta"):
        model = nn.Sequential(_in_the_root(), reference.RiRLayer(4, 4))
    assert [item.name for item in fuse_(model).replaced] == ["0", "1"]
    original = settle(nn.Sequential(_in_the_root(), reference.RiRLayer(4, 4)))
    model.to_empty(device="cpu").double().load_state_dict(original.state_dict())
    assert_same(model, original, X, calls=2)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_row_52_a_failure_on_the_way_changes_nothing(failing, monkeypatch):
    """Looking comes before swapping: an error in any unit leaves every unit as it was."""
    model = net()
    before, looked = snapshot(model), []
    select = fuse._select

    def fails(module, *args):
        if len(looked) == failing:
            raise KeyboardInterrupt
        looked.append(module)
        return select(module, *args)

    monkeypatch.setattr(fuse, "_select", fails)
    with pytest.raises(KeyboardInterrupt):
        fuse_(model)
    assert_unchanged(model, before)


class _Final(nn.Sequential):
    def __init_subclass__(cls, **options):
        raise TypeError("this class is final")


class _Sealed(nn.Sequential):
    def __setattr__(self, name, value):
        raise AttributeError(f"sealed: {name}")

    def __init__(self, *modules):
        nn.Module.__init__(self)
        for index, module in enumerate(modules):
            self.add_module(str(index), module)


def test_row_52_classes_that_resist():
    """One that refuses subclasses is not asked, for no code of the user's sees ours; one that sets nothing fits."""

    def make():
        parts = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        return [nn.Sequential(*copy.deepcopy(parts)), _Final(*copy.deepcopy(parts)), _Sealed(*copy.deepcopy(parts))]

    torch.manual_seed(0)
    model = settle(nn.Sequential(*make()))
    original = copy.deepcopy(model)
    report = fuse_(model)
    assert [item.name for item in report.replaced] == ["0", "1", "2"], str(report)
    assert_same(model, original, X, calls=3)
    unfuse_(model)
    assert [type(module) for module in model] == [nn.Sequential, _Final, _Sealed]


def test_row_53_fusing_keeps_attributes_and_parameters():
    """Parameter and buffer objects are the same, and so are the names of all attributes."""
    model = net()
    _, state = snapshot(model)
    attributes = [list(m.__dict__) for m in model.modules()]
    fuse_(model)
    assert [list(m.__dict__) for m in model.modules()] == attributes
    for name, value in model.state_dict(keep_vars=True).items():
        assert id(value) == state[name][0]


def test_row_53_an_optimizer_made_before_fusing():
    """It holds the very parameters of the fused model, and trains them as it would have."""
    fused, original = resnet(), resnet()
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3) for model in (fused, original)]
    rir.fuse_(fused)
    held = [p for group in optimizers[0].param_groups for p in group["params"]]
    assert all(ours is theirs for ours, theirs in zip(held, fused.parameters(), strict=True))
    for model, optimizer in zip((fused, original), optimizers, strict=True):
        for i in range(3):
            optimizer.zero_grad()
            model(images(seed=i)).square().sum().backward()
            optimizer.step()
    # where a gradient is next to nothing Adam divides rounding by rounding: by eps at least, 1e-16 / 1e-8 of a step
    assert_close_state(fused, original, rtol=1e-9, atol=1e-9)


def test_row_54_fuse_and_unfuse_leave_no_trace():
    """unfuse_: outputs, state, classes and attributes bit for bit as before."""
    model = net()
    before, y = snapshot(model), model.eval()(X)
    model.train()
    report = fuse_(model)
    assert report.model is model
    assert [(item.name, item.pattern, item.kind) for item in report.replaced] == [
        ("stem", "conv_bn_act", "Sequential"),
        ("layers.0", "conv_add_bn_act", "RiRLayer"),
        ("layers.1", "conv_add_bn_act", "RiRLayer"),
    ]
    assert isinstance(model.layers[0], reference.RiRLayer) and "FusedRiRLayer" in repr(model)
    assert snapshot(model)[0] != before[0]
    assert unfuse_(model) is model
    assert_unchanged(model, before)
    with fused_calls(0):
        assert torch.equal(model.eval()(X), y)
    assert unfuse_(model) is model  # twice is as good as once


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_row_55_checkpointing_counts_twice_as_nn_does(use_reentrant):
    """Forward runs again in backward and sees the batch again: gradients are those without, statistics move twice."""
    (fused, nns), (plain, _), x = regions(), regions(), randn(2, 4, 6, 6)
    with set_checkpoint_early_stop(False):
        found, theirs = (checkpointed_step(model, x, use_reentrant=use_reentrant) for model in (fused, nns))
    leaf = x.clone().requires_grad_()
    y = plain(leaf)
    y.square().sum().backward()
    torch.testing.assert_close(found, [leaf.grad, *(p.grad for p in plain.parameters())], **CLOSE)
    torch.testing.assert_close(found, theirs, **CLOSE)
    plain(x)  # the second time
    assert_close_state(fused, plain, **CLOSE)
    assert_close_state(fused, nns, **CLOSE)


@distributed
@pytest.mark.parametrize(("synchronized", "static", "view"), WRAPPED)
def test_row_56_two_forwards_before_one_backward(ranks, synchronized, static, view):
    """DDP with broadcast_buffers: no version error, and the gradients of both.

    Rank 0's buffers are sent around before each forward: rank 1 goes on from them.
    """
    found = [rank["data parallel"][synchronized, static, view] for rank in ranks[:2]]
    parts = [distributed_images()] if synchronized else distributed_images().split(SIZES)
    models = [distributed_model(fused=False) for _ in parts]
    for made, x in zip(models, parts, strict=True):
        made(x).square().sum().backward()
    for made in models[1:]:
        for mine, sent in zip(made.buffers(), models[0].buffers(), strict=True):
            mine.copy_(sent)
    for made, x in zip(models, parts, strict=True):
        made(2 * x).square().sum().backward()  # torch's own norms would not have both forwards first
    expected = [distributed_state(made) for made in models]
    for rank, result in enumerate(found):
        wanted = dict(expected[0 if synchronized else rank])
        for name in wanted:
            if name.startswith("gradient"):  # averaged
                wanted[name] = sum(one[name] for one in expected) / len(SIZES)
        assert_same_tensors(result, wanted, **CLOSE)


# 57: waiting for the device, and being watched


class _NoReading(TorchDispatchMode):
    """Fails where the host reads a value of a tensor: on a GPU it would wait there."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator.name().partition(".")[0] not in (
            "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal",
            "aten::masked_select", "aten::unique_dim", "aten::_unique2",
        ), operator.name()  # fmt: skip
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("impl", ["reference", "torch", "hybrid", "triton"])
def test_row_57_no_value_is_read_on_the_host(impl, training):
    """Forward and backward of the operators around our kernels: on meta tensors, which have no values at all."""
    with torch.device("meta"):
        block = rir.RiRBlock(8, 16, stride=2, impl=impl if impl in ("reference", "torch") else "auto").train(training)
        x = torch.empty(2, 8, 6, 6, requires_grad=True)
    if impl in ("hybrid", "triton"):
        with _NoReading(), torch.no_grad():
            spec = registered_op.flat(ConvBNActSpec(padding=(1, 1)))
            weight, vector = torch.empty(8, 8, 3, 3, device="meta"), torch.empty(8, device="meta")
            outputs = torch.ops.rir_kernels.conv_bn_act(
                x, weight, None, vector, vector, vector, vector, [], *spec, training, True, impl
            )
        assert outputs[0].shape == x.shape
        return
    with _NoReading():
        block(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    "impl",
    ["reference", "torch", *(pytest.param(name, marks=pytest.mark.interpreter) for name in ("hybrid", "triton"))],
)
def test_row_57_no_value_is_read_in_a_step(impl):
    """The same of a step that computes, statistics and counters included; kernels and what starts them too."""
    block, x = rir.RiRBlock(4, 6, stride=2, impl=impl), randn(2, 4, 4, 4).float().requires_grad_()
    with _NoReading():
        block(x).sum().backward()
    assert x.grad.isfinite().all()
    assert block.layers[1].bn.num_batches_tracked == 1


@pytest.mark.gpu
@pytest.mark.real_gpu("the driver's word that the host waits")
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "contiguous"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("impl", ["torch", "hybrid", "triton"])
def test_row_57_nothing_waits_for_the_device(impl, training, memory_format):
    """torch.cuda.set_sync_debug_mode("error"): forward and backward, the first time and by the plan."""
    block = rir.RiRBlock(8, 16, stride=2, impl=impl, device="cuda").train(training)
    x = torch.randn(4, 8, 8, 8, device="cuda").contiguous(memory_format=memory_format).requires_grad_()
    block(x).sum().backward()  # compiles, and makes the vendor's handles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            block(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_row_57_a_profiler_and_hooks_change_nothing(impl):
    """The same bits with torch.profiler and hooks on the module and its tensors, and both see the call."""
    unit, x = rir.ConvBNAct(4, 4, 1, impl=impl), randn(1, 4, 2, 2).float().requires_grad_()
    watched, seen = copy.deepcopy(unit), []

    def step(unit):
        y = unit(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *unit.parameters()]), *unit.buffers()]

    expected = step(unit)
    watched.register_forward_hook(lambda *_: seen.append("forward"))
    watched.register_full_backward_hook(lambda *_: seen.append("backward"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        found = step(watched)
    assert seen == ["forward", "backward"] and len(profiler.events()) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_row_58_use_impl_is_undone_by_an_exception(error):
    """Ctrl-C and errors within it: the mode is what it was."""
    with pytest.raises(error), rir.use_impl("reference"):
        raise error
    assert preference.effective_impl("auto") == "auto"


# 59: tuning that ends early

SHAPES = [Shape(8, 8, 4, batch=2), Shape(8, 16, 5, 1, 2, batch=2)]


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """tuned(clock) tunes two shapes by that clock: [tiles in the file that is left], None where there is none."""
    monkeypatch.setattr(tune, "gpu_of", lambda device: DEVICE)
    monkeypatch.setattr(tune, "KERNELS", (tune.CONVOLUTION,))
    # that the candidates compute the same is the business of another test
    monkeypatch.setattr(tune, "_calls", lambda *_: (lambda: None, lambda: type("Verdict", (), {"passed": True})))

    def run(clock):
        monkeypatch.setattr(timing, "measure_steady", clock)
        tune.tune(SHAPES, ["fp16"], torch.device("cpu"), tmp_path, candidates=1, settings=timing.Settings(rounds=1))

    run.folder = tmp_path
    return run


def _fast(calls, *_):
    return {index: timing.Timing(samples=[1.0]) for index in calls}


def _tiles(folder):
    """What is read of the file that tuning left, and nothing else is there."""
    (path,) = folder.iterdir()
    measured._load.cache_clear()
    found = measured._load(path, "tiles", measured._entry, DEVICE)
    measured._load.cache_clear()
    return found


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_row_59_tuning_that_is_interrupted(tuned, error):
    """The shapes before are in the file, whole; what was begun is not."""
    ops = len(tune.CONVOLUTION.ops(SHAPES[0]))
    calls = []

    def clock(*args):
        calls.append(1)
        if len(calls) > ops:
            raise error
        return _fast(*args)

    with pytest.raises(error):
        tuned(clock)
    assert len(_tiles(tuned.folder)) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", ["write", "replace"])
def test_row_59_interrupted_while_it_writes(tuned, error, step, monkeypatch):
    """The file before is kept, and no part of the next one stays beside it."""
    writes = []

    def interrupted(function):
        def wrapped(*args, **kwargs):
            writes.append(1)
            if len(writes) > 1:
                if step == "write":
                    function(args[0], args[1][: len(args[1]) // 2], **kwargs)
                raise error
            return function(*args, **kwargs)

        return wrapped

    owner, name = (files.Path, "write_text") if step == "write" else (files.os, "replace")
    monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
    with pytest.raises(error):
        tuned(_fast)
    monkeypatch.undo()
    assert len(writes) == 2 and len(_tiles(tuned.folder)) == 1


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_row_59_killed_while_it_writes(tmp_path):
    """SIGKILL at any moment of many writes: the file is one of those that were written, whole."""
    code = f"""
from tooling.files import save_json
number = 0
while True:
    number += 1
    save_json({str(tmp_path / "file.json")!r}, {{"schema": 1, "tiles": [number] * 20000}})
    if number == 1:
        print("written", flush=True)
"""
    for delay in (0.0, 0.003, 0.011, 0.02):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        with process:
            assert process.stdout.readline() == "written\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        found = json.loads((tmp_path / "file.json").read_text())["tiles"]
        assert len(found) == 20000 and len(set(found)) == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_row_60_bf16_in_the_interpreter(impl):
    """Refused with the reason, by name and within use_impl: its products would be wrong."""
    arguments = call_arguments()
    half = {name: arguments[name].bfloat16() for name in ("x", "weight", "bias", "residual")}
    message = f'impl="{impl}" refuses bfloat16 under TRITON_INTERPRET=1'
    call_refused(TypeError, message, "wrong numbers", impl=impl, **half)
    with rir.use_impl(impl):
        call_refused(TypeError, message, **half)
