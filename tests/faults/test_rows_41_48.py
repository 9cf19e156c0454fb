"""Memory that ends, triton that is missing or too old, unknown GPUs, repeated calls, and ranks that differ.

The number in a test's name is that of the fault in docs/faults.md.
"""

import contextlib
import copy
import functools
import itertools
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rir_kernels as rir
from rir_kernels.common import devices, versions, warn
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.dispatch import choose, operation
from rir_kernels.distributed.ranks import Ranks
from tests.kernels.targets import TARGETS
from tests.kernels.test_layer import CASES as LAYER_CASES
from tests.kernels.test_layer import _call as layer_call
from tests.repository.test_imports import BLOCK_TRITON, CALL, run_python
from tests.support.helpers import run
from tests.support.ranks import assert_same as assert_same_tensors
from tests.support.ranks import one_step, settled, whole_of
from tests.support.ranks_of_rows import configurations, fused_sequential, of_the_ranks
from tests.support.surgery_helpers import CLOSE, randn

conv_bn_act = rir.functional.conv_bn_act
distributed = pytest.mark.xdist_group("distributed")  # processes of their own: not in two workers at once


@pytest.fixture(scope="module")
def ranks():
    return of_the_ranks()


# 41: memory that ends


class _Scarce(TorchDispatchMode):
    """OutOfMemoryError from the n-th operator on that takes memory."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view and not operator._schema.is_mutable:
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("no memory left")
        return operator(*args, **(kwargs or {}))


@contextlib.contextmanager
def _scarce_by_name(left):
    """The same, where a mode would be seen and another way taken: at torch's own functions."""

    def failing(allocate):
        def counting(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("no memory left")
            return allocate(*args, **kwargs)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_strided"), (torch.Tensor, "clone")):
            patch.setattr(owner, name, failing(getattr(owner, name)))
        yield


IN_KERNELS = [
    pytest.param("hybrid", _Scarce, marks=pytest.mark.interpreter, id="hybrid"),
    pytest.param("triton", _Scarce, marks=pytest.mark.interpreter, id="triton"),
    pytest.param("triton", _scarce_by_name, marks=pytest.mark.interpreter, id="triton, repeated"),
]
IN_TORCH = [pytest.param(impl, _Scarce, id=impl) for impl in ("torch", "reference")]


def _synchronize(monkeypatch):
    """Norms as of several ranks, of which the others have no pixels."""
    monkeypatch.setattr(Ranks, "gather", lambda self, row: row.clone())
    apply, group = operation.apply, types.SimpleNamespace(size=lambda: 1)
    monkeypatch.setattr(operation, "apply", lambda *a, **more: apply(*a, **more | {"process_group": group}))


LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
KINDS = {"fp32": (torch.float32, False), "fp16": (torch.float16, False), "synchronized": (torch.float32, True)}
FORMATS = {"last": (LAST, LAST), "contiguous": (CONTIGUOUS, CONTIGUOUS), "weight last": (CONTIGUOUS, LAST)}


@pytest.mark.parametrize(("of_x", "of_weight"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("dtype", "of_ranks"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("impl", "scarce"), [*IN_TORCH, *IN_KERNELS])
def test_row_41_memory_that_ends_anywhere_leaves_the_state_alone(
    impl, scarce, dtype, of_ranks, of_x, of_weight, monkeypatch
):
    """OutOfMemoryError at each allocation of a training forward in turn: statistics and counter stay as they were."""
    if of_ranks:
        _synchronize(monkeypatch)
        if impl in ("hybrid", "triton"):
            scarce = _scarce_by_name  # a kernel updates the buffers, and the interpreter's own operators follow it
    layer = rir.RiRLayer(8, 8, impl=impl, dtype=dtype).to(memory_format=of_weight)
    x = randn(1, 8, 2, 2).to(dtype).contiguous(memory_format=of_x)
    copy.deepcopy(layer)(x)  # leaves the plan
    before = copy.deepcopy(layer.state_dict())
    for failed in itertools.count():
        try:
            with scarce(failed):
                y = layer(x)
        except torch.OutOfMemoryError:
            for name, value in layer.state_dict().items():
                assert torch.equal(value, before[name]), (failed, name)
        else:
            break
    assert failed >= 2 and layer.bn.num_batches_tracked == 1
    twin = rir.RiRLayer(8, 8, impl=impl, dtype=dtype).to(memory_format=of_weight)
    twin.load_state_dict(before)
    assert torch.equal(twin(x), y)  # the failures left nothing behind


@pytest.mark.parametrize(("impl", "scarce"), IN_KERNELS)
def test_row_41_memory_that_ends_in_a_backward_pass(impl, scarce):
    """At each allocation in turn: gradients that were there, statistics and counter stay; then the call works.

    What runs operators of torch is a graph of torch's, of which some gradients may have been added already.
    """
    layer = rir.RiRLayer(8, 8, impl=impl)
    x, outer = (
        randn(1, c, 2, 2).float().contiguous(memory_format=torch.channels_last).requires_grad_() for c in (8, 4)
    )
    leaves = [x, outer, *layer.parameters()]

    def loss():
        return layer(x, outer=outer).square().sum()

    loss().backward()  # leaves the plan, and gradients to add to
    first = [leaf.grad.clone() for leaf in leaves]
    for failed in itertools.count():
        pending = loss()
        before = copy.deepcopy(layer.state_dict())
        try:
            with scarce(failed):
                pending.backward()
        except torch.OutOfMemoryError:
            for leaf, expected in zip(leaves, first, strict=True):
                assert torch.equal(leaf.grad, expected), failed
            for name, value in layer.state_dict().items():
                assert torch.equal(value, before[name]), (failed, name)
        else:
            break
    assert failed >= 2
    for leaf, expected in zip(leaves, first, strict=True):  # the same batch: the same gradient once more
        torch.testing.assert_close(leaf.grad, 2 * expected, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.real_gpu("memory that runs out")
@pytest.mark.parametrize("impl", ["triton", "hybrid"])
@pytest.mark.parametrize("plain", [True, False], ids=["contiguous", "channels_last"])
def test_row_41_a_gpu_without_memory(impl, plain):
    """torch.OutOfMemoryError, statistics untouched, and the same call works once there is room."""
    layer = rir.RiRLayer(64, 64, impl=impl, device="cuda")
    x = torch.randn(64, 64, 64, 64, device="cuda")  # 64 MiB, and outputs of as much
    x = x if plain else x.contiguous(memory_format=torch.channels_last)
    expected = copy.deepcopy(layer)(x)
    before = copy.deepcopy(layer.state_dict())
    limit = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        for extra in range(0, 512, 32):
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (extra << 20)) / limit)
            try:
                y = layer(x)
                break
            except torch.OutOfMemoryError:
                for name, value in layer.state_dict().items():
                    assert torch.equal(value, before[name]), (extra, name)
            torch.cuda.empty_cache()
        else:
            pytest.fail("it never had enough")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert extra > 0 and torch.equal(y, expected)


# 42: triton and its versions


def test_row_42_without_triton():
    """Import and CPU calls work; a kernel that was asked for raises ImportError with what is needed."""
    code = (
        BLOCK_TRITON
        + CALL
        + """
assert call("auto").shape == (2, 4, 3, 3)
assert rir.RiRLayer(4, 6)(torch.randn(2, 4, 5, 5)).shape == (2, 6, 5, 5)
print(call("triton"))
print(call("hybrid"))
with rir.use_impl("triton"):
    print(call("auto"))
"""
    )
    for line, impl in zip(run_python(code, interpret="1").splitlines(), ("triton", "hybrid", "triton"), strict=True):
        assert line.startswith(f'ImportError: impl="{impl}" needs triton >= 3.6')
        assert "No module named 'triton'" in line and "pip install triton" in line


def test_row_42_triton_too_old():
    """ImportError with the version that was found and the one that is needed."""
    code = (
        """
import sys, types
sys.modules["triton"] = types.ModuleType("triton")
sys.modules["triton"].__version__ = "3.5.1"
"""
        + CALL
        + """
print(call("triton"))
assert call("auto").shape == (2, 4, 3, 3)
"""
    )
    assert run_python(code, interpret="1") == 'ImportError: impl="triton" needs triton >= 3.6, found 3.5.1\n'


def test_row_42_torch_too_old():
    """The same of torch."""
    code = (
        CALL
        + """
torch.__version__ = "2.9.1+cu128"
print(call("triton"))
assert call("auto").shape == (2, 4, 3, 3)
"""
    )
    assert run_python(code, interpret="1") == 'ImportError: impl="triton" needs torch >= 2.10, found 2.9.1+cu128\n'


@pytest.mark.parametrize("version", ["3.6.0", "3.6.0+git1234", "3.7rc0", "3.10.1", "4.0.0"])
def test_row_42_later_versions_are_taken(version, monkeypatch):
    """Numbers are compared as numbers, and none is too new."""
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    assert versions.triton_missing() == ""


def test_row_42_a_broken_triton():
    """An installation that fails with more than an ImportError is as good as none, and the reason is told."""
    code = (
        BLOCK_TRITON.replace(
            'ModuleNotFoundError("No module named \'triton\'", name="triton")', 'OSError("no libcuda")'
        )
        + CALL
        + """
assert call("auto").shape == (2, 4, 3, 3)
print(call("triton"))
"""
    )
    line = run_python(code, interpret="1")
    assert line.startswith('ImportError: impl="triton" needs triton >= 3.6') and "OSError: no libcuda" in line


# 43: GPUs that the kernels are not written for


SPEC = ConvBNActSpec(padding=(1, 1))


class _On:
    """What `resolve` reads of a tensor on that device."""

    dtype = torch.float16
    shape = (2, 8, 4, 4)

    def __init__(self, device):
        self.device = torch.device(device)


WEIGHT = torch.empty(8, 8, 3, 3)


@pytest.fixture
def unknown_devices(monkeypatch):
    monkeypatch.setattr(warn, "_warned", set())
    choose._find_missing_on.cache_clear()
    yield
    choose._find_missing_on.cache_clear()


def _old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Made-up GPU 7")


def _rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.3")


UNSUPPORTED = {
    "capability 7.5": ("cuda:0", _old, r"compute capability 8\.0 or later, Made-up GPU 7 \(cuda:0\) has 7\.5"),
    "ROCm": ("cuda:0", _rocm, "ROCm"),
    "XPU": ("xpu:0", None, "xpu:0"),
    "MPS": ("mps:0", None, "mps:0"),
}


@pytest.mark.parametrize(("device", "make", "words"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_row_43_an_unsupported_device(monkeypatch, unknown_devices, device, make, words):
    """ "auto" does without the kernels, once with a warning; a name that was asked for raises."""
    if make:
        make(monkeypatch)
    x = _On(device)
    with pytest.warns(RuntimeWarning, match=words) as warned:
        assert {choose.resolve("auto", x, WEIGHT, SPEC) for _ in range(3)} == {"torch"}
    assert len(warned) == 1
    for impl in ("hybrid", "triton"):
        with pytest.raises(RuntimeError, match=f'impl="{impl}".*{words}'):
            choose.resolve(impl, x, WEIGHT, SPEC)
    assert choose.resolve("torch", x, WEIGHT, SPEC) == "torch"


def test_row_43_a_cpu_needs_no_warning(unknown_devices):
    """There was nothing to expect."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.resolve("auto", _On("cpu"), WEIGHT, SPEC) == "torch"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_row_43_every_gpu_since_ampere_takes_the_kernels(monkeypatch, unknown_devices, capability):
    """What is supported is not refused."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Made-up GPU 8")
    devices._name_at.cache_clear()
    try:
        assert choose.resolve("auto", _On("cuda:0"), WEIGHT, SPEC) == "triton"
    finally:
        devices._name_at.cache_clear()


# 45: the same bits


@pytest.mark.parametrize("target", TARGETS)
def test_row_45_the_same_bits_every_time(target):
    """Outputs, gradients and statistics; on a GPU 250 times."""
    tensors, options, dy = layer_call(LAYER_CASES["P4 stride 2, two residuals"], target, True)
    first = run(functools.partial(conv_bn_act, impl="triton"), tensors, options, dy)
    for _ in range(1 if target[0].type == "cpu" else 250):  # programs run one after the other in the interpreter
        again = run(functools.partial(conv_bn_act, impl="triton"), tensors, options, dy)
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), name


def test_row_45_the_same_bits_in_every_process(monkeypatch):
    """Two processes whose hashes are seeded otherwise, 250 steps of each the same; a few in the slow interpreter."""
    code = """
import hashlib, torch
import rir_kernels as rir
torch.set_num_threads(1)
digests = set()
for impl, steps in (("torch", 250), ("triton", 3)):
    for _ in range(steps):
        torch.manual_seed(0)
        layer, x = rir.ConvBNAct(8, 8, 1, impl=impl), torch.randn(1, 8, 2, 2, requires_grad=True)
        y = layer(x)
        digest = hashlib.sha256(impl.encode())
        for tensor in (y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]), *layer.buffers()):
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        digests.add(digest.hexdigest())
print(*digests)
"""
    found = set()
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.update(run_python(code, interpret="1").split())
    assert len(found) == 2  # one of each implementation


@distributed
def test_row_45_the_same_bits_on_every_rank(ranks):
    """Many steps with synchronized norms: a rank's own bits never change, and all ranks have the statistics of all."""
    for rank in ranks:
        assert len(rank["repeats"]) == 1
    (statistics,) = {statistics for rank in ranks for _, statistics in rank["repeats"]}
    assert len(statistics) == 64


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_row_45_deterministic_mode(impl):
    """Nothing is refused by torch's own switch, and 250 steps have the same bits."""
    layer, x = rir.RiRLayer(8, 8, impl=impl).eval(), randn(2, 8, 4, 4).float().requires_grad_()

    def step():
        y = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    torch.use_deterministic_algorithms(True)
    try:
        first = step()
        for _ in range(249):
            assert all(torch.equal(one, other) for one, other in zip(step(), first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# 46 to 48: ranks


@distributed
def test_row_46_all_ranks_choose_the_same_tiles(ranks):
    """The rule knows the shape and the kind of device alone."""
    here = configurations()
    assert len(set(here)) > 10
    assert [rank["configurations"] for rank in ranks] == [here] * len(ranks)


@distributed
def test_row_47_groups_of_ranks(ranks):
    """Uneven and empty batches, subsets of the ranks, one alone: as nn.BatchNorm2d has it for the whole batch."""
    x, pairs, triples = zip(*(rank["groups"] for rank in ranks), strict=True)
    layers = {}
    for members in ([0, 1], [2, 3]):
        layer = settled(rir.RiRLayer(4, 6))
        found = whole_of([pairs[rank] for rank in members])
        assert_same_tensors(found, one_step(layer, [torch.cat([x[rank] for rank in members])], 1), **CLOSE)
        layer.zero_grad()
        layers |= dict.fromkeys(members, layer)
    for members in ([0, 1, 2], [3]):
        layer = copy.deepcopy(layers[members[0]])
        expected = one_step(layer, [torch.cat([x[rank] for rank in members])], 1)
        results = [triples[rank] for rank in members]
        # the norms came with the statistics of other groups
        for result in [*results, expected]:
            for name in ("bn.running_mean", "bn.running_var"):
                del result[name]
        assert_same_tensors(whole_of(results), expected, **CLOSE)


@distributed
def test_row_48_a_mistake_on_one_rank_is_found_before_anything_is_exchanged(ranks):
    """It raises there, nobody hangs, and the next call of all ranks is right."""
    faults = [rank["faults"] for rank in ranks]
    x = torch.cat(
        [torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(rank)) for rank in range(len(ranks))]
    ).double()
    made = {
        "BatchNorm2d": nn.BatchNorm2d(4),
        "ConvBNAct": rir.ConvBNAct(4, 4, 3),
        "FusedSequential": fused_sequential(),
    }
    expected = {kind: one_step(settled(model), [x], 1) for kind, model in made.items()}
    assert len(faults[0]) == 21
    for kind, fault in faults[0]:
        # whatever the failed call had sent would have met the good one's
        assert_same_tensors(whole_of([rank[kind, fault] for rank in faults]), expected[kind], **CLOSE)
