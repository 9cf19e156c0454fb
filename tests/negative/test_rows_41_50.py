"""Memory that ends, what is missing or too old, hostile files, ranks that differ, states and checkpoints.

The number in a test's name is that of the fault in docs/faults.md.
"""

import contextlib
import copy
import functools
import itertools
import json
import os
import pickle
import stat
import struct
import sys
import threading
import types
import warnings
from math import prod

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rir_kernels as rir
from bench.results import save_json
from models.training import build, checkpoint
from models.training.errors import CheckpointError
from rir_kernels import choices, device_files, dispatch
from rir_kernels.spec import ConvBNActSpec
from rir_kernels.triton import measured
from tests.bench.test_tune import DEVICE, PROBLEM, WGRAD_PROBLEM, wgrad_written, written
from tests.citizen.networks import BLOCKS, resnet, resnet_twins
from tests.distributed.ranks import assert_same as assert_same_tensors
from tests.distributed.ranks import one_step, settled, whole_of
from tests.helpers import run
from tests.kernels.targets import TARGETS
from tests.kernels.test_layer import CASES as LAYER_CASES
from tests.kernels.test_layer import _call as layer_call
from tests.negative.ranks_of_rows import configurations, fused_sequential, of_the_ranks
from tests.surgery_helpers import CLOSE, randn, settle
from tests.test_imports import BLOCK_TRITON, CALL, run_python

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


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("impl", "scarce"),
    [
        ("torch", _Scarce), ("reference", _Scarce), pytest.param("hybrid", _Scarce, marks=pytest.mark.interpreter),
        pytest.param("triton", _Scarce, marks=pytest.mark.interpreter),
        pytest.param("triton", _scarce_by_name, marks=pytest.mark.interpreter),
    ],
    ids=["torch", "reference", "hybrid", "triton", "triton, repeated"],
)  # fmt: skip
def test_row_41_memory_that_ends_anywhere_leaves_the_state_alone(impl, scarce, dtype, memory_format):
    """OutOfMemoryError at each allocation of a training forward in turn: statistics and counter stay as they were."""
    layer = rir.RiRLayer(8, 8, impl=impl, dtype=dtype)
    x = randn(1, 8, 2, 2).to(dtype).contiguous(memory_format=memory_format)
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
    twin = rir.RiRLayer(8, 8, impl=impl, dtype=dtype)
    twin.load_state_dict(before)
    assert torch.equal(twin(x), y)  # the failures left nothing behind


@pytest.mark.gpu
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


@pytest.mark.parametrize("version", ["3.6.0", "3.6.0+git1234", "3.10.1", "4.0.0"])
def test_row_42_later_versions_are_taken(version, monkeypatch):
    """Numbers are compared as numbers, and none is too new."""
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    assert dispatch.triton_missing() == ""


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
    monkeypatch.setattr(dispatch, "_warned", set())
    dispatch._find_missing_on.cache_clear()
    yield
    dispatch._find_missing_on.cache_clear()


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
        assert {dispatch.resolve("auto", x, WEIGHT, SPEC) for _ in range(3)} == {"torch"}
    assert len(warned) == 1
    for impl in ("hybrid", "triton"):
        with pytest.raises(RuntimeError, match=f'impl="{impl}".*{words}'):
            dispatch.resolve(impl, x, WEIGHT, SPEC)
    assert dispatch.resolve("torch", x, WEIGHT, SPEC) == "torch"


def test_row_43_a_cpu_needs_no_warning(unknown_devices):
    """There was nothing to expect."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.resolve("auto", _On("cpu"), WEIGHT, SPEC) == "torch"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_row_43_every_gpu_since_ampere_takes_the_kernels(monkeypatch, unknown_devices, capability):
    """What is supported is not refused."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Made-up GPU 8")
    dispatch._device_name.cache_clear()
    try:
        assert dispatch.resolve("auto", _On("cuda:0"), WEIGHT, SPEC) == "triton"
    finally:
        dispatch._device_name.cache_clear()


# 44: files that somebody else wrote

READERS = {
    "tiles": lambda: measured.measured_tile(PROBLEM, DEVICE),
    "wgrad_tiles": lambda: measured.measured_wgrad_tile(WGRAD_PROBLEM, DEVICE),
    "choices": lambda: choices.measured_choice(DEVICE.name, (8, 8, 3, 1, 4, "torch.float32", True)),
}
readers = pytest.mark.parametrize("field", READERS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    monkeypatch.setattr(choices, "FOLDER", tmp_path)
    _forget()
    yield tmp_path
    _forget()


def _forget():
    measured._load.cache_clear()
    choices._load.cache_clear()


def _path(folder):
    return folder / "made-up-gpu-9.json"


def _good(folder, field):
    """The entry of a good file, which is written."""
    if field == "choices":
        numbers = {"c_in": 8, "c_out": 8, "kernel": 3, "stride": 1, "rows": 4}
        entry = {**numbers, "dtype": "torch.float32", "training": True, "impl": "hybrid"}
        _path(folder).write_text(json.dumps({"schema": 1, "choices": [entry]}))
    else:
        (written if field == "tiles" else wgrad_written)(folder)
    return json.loads(_path(folder).read_text())[field][0]


def _ignored(field):
    """The look-up finds nothing, and says why, once."""
    _forget()
    with pytest.warns(UserWarning, match=r"made-up-gpu-9\.json is ignored, .*(bench tune|bench choose)") as warned:
        assert [READERS[field](), READERS[field]()] == [None, None]
    assert len(warned) == 1
    return str(warned[0].message)


class _Executed:
    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.system, (f"touch {self._path}",)


DEEP = "[" * 100_000
CORRUPT = {
    "nothing": "", "cut off": '{"schema": 1, "FIELD": [', "no text": b"\xff\xfe{\x00", "a list": "[]", "a number": "1",
    "null": "null", "no schema": '{"FIELD": []}', "another schema": '{"schema": 2, "FIELD": []}',
    "no field": '{"schema": 1}', "a path": '{"schema": 1, "FIELD": "../../etc/passwd"}',
    "null entries": '{"schema": 1, "FIELD": null}', "numbers": '{"schema": 1, "FIELD": [1, 2]}',
    "lists": '{"schema": 1, "FIELD": [[[]]]}', "empty entries": '{"schema": 1, "FIELD": [{}]}',
    "lists for objects": '{"schema": 1, "FIELD": [{"problem": [], "tile": []}]}', "deep": DEEP,
    "deep within": '{"schema": 1, "FIELD": ' + DEEP, "5000 digits": '{"schema": 1' + "0" * 5000 + "}",
    "code": "__import__('os').system('touch marker')",
}  # fmt: skip


@readers
@pytest.mark.parametrize("kind", CORRUPT)
def test_row_44_corrupt_files_are_ignored(folder, field, kind):
    """Whatever stands in it: one warning, and the rule decides."""
    content = CORRUPT[kind]
    _path(folder).write_bytes(content if isinstance(content, bytes) else content.replace("FIELD", field).encode())
    _ignored(field)


# none of these is a number, a name or a pair that a good entry has
HOSTILE = (10**400, -1, 0, 1e999, float("nan"), "../../etc/passwd", "", None, {"a": [1]}, [[[]]], [10**400] * 3)


def _leaves(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield path


@readers
def test_row_44_no_hostile_value_gets_through(folder, field):
    """Huge numbers, wrong types, paths and nesting in each place of a good entry: nothing is chosen, nothing raised."""
    good = _good(folder, field)
    assert READERS[field]() is not None
    tried = 0
    for path, value in itertools.product(_leaves(good), HOSTILE):
        entry = copy.deepcopy(good)
        owner = functools.reduce(dict.__getitem__, path[:-1], entry)
        if owner[path[-1]] == value:
            continue
        owner[path[-1]] = value
        _path(folder).write_text(json.dumps({"schema": 1, field: [entry]}))
        _forget()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert READERS[field]() is None, (path, value)
        tried += 1
        # another problem is a fine entry, which is of no use here; another tile is none
        if path[0] in ("tile", "impl"):
            assert "is ignored" in str(warned[0].message), (path, value)
        assert len(warned) <= 1
    assert tried > 80


@readers
def test_row_44_one_bad_entry_spoils_the_file(folder, field):
    """Half a file is not trusted."""
    good = _good(folder, field)
    _path(folder).write_text(json.dumps({"schema": 1, field: [good, 1]}))
    _ignored(field)


@readers
def test_row_44_pickles_are_not_looked_into(folder, field):
    """Never executed: a file is JSON or nothing."""
    _path(folder).write_bytes(pickle.dumps(_Executed(folder / "marker"), 0))
    _ignored(field)
    assert not (folder / "marker").exists()


@readers
@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
def test_row_44_files_of_others(folder, field, monkeypatch):
    """What anybody else could have written is ignored; what belongs to root or to the code's owner is read."""
    _good(folder, field)
    path, code = _path(folder), os.stat(device_files.__file__)
    assert READERS[field]() is not None

    path.chmod(0o666)
    if not code.st_mode & stat.S_IWOTH:  # else whoever may write the file may write the code
        assert "everyone may write to it" in _ignored(field)
    path.chmod(0o644)

    real = os.fstat
    for owner in {0, os.geteuid(), code.st_uid, 54321}:
        found = os.stat_result([*real(os.open(path, os.O_RDONLY))[:4], owner, *path.stat()[5:10]])
        monkeypatch.setattr(device_files.os, "fstat", lambda handle, found=found: found)
        if owner == 54321:
            assert "belongs to user 54321" in _ignored(field)
        else:
            _forget()
            assert READERS[field]() is not None


@readers
@pytest.mark.skipif(os.name != "posix", reason="pipes and device files are POSIX's")
@pytest.mark.parametrize("kind", ["folder", "pipe", "/dev/zero", "large"])
def test_row_44_what_is_no_file_or_has_no_end(folder, field, kind, monkeypatch):
    """Nothing blocks, and nothing is read without end."""
    path = _path(folder)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "/dev/zero":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.setattr(device_files, "MOST_BYTES", 1000)
        path.write_text('{"schema": 1, "FIELD": []}'.replace("FIELD", field) + " " * 1000)
    assert ("more than 1000 bytes" if kind == "large" else "not a file") in _ignored(field)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "..", "C:\\x", "n\0l", ""])
def test_row_44_names_of_devices_are_no_paths(name):
    """What a driver calls its device cannot lead out of the folder."""
    assert not set(device_files.slug(name)) & set("/\\.:\0")


def test_row_44_a_home_that_cannot_be_written(monkeypatch):
    """Nothing of ours is kept there."""
    for variable in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(variable, "/proc/there/is/none")
    code = """
import torch, warnings
warnings.simplefilter("error", UserWarning)
import rir_kernels as rir
for impl in ("torch", "triton"):
    rir.ConvBNAct(4, 6, 1, impl=impl).eval()(torch.randn(1, 4, 2, 2))
"""
    assert run_python(code, interpret="1") == ""


def test_row_44_writers_at_the_same_time(tmp_path):
    """A reader meets one writer's file or another's, whole, and no drafts stay."""
    path, done = tmp_path / "made-up-gpu-9.json", threading.Event()
    errors, seen = [], set()

    def write(writer):
        try:
            for _ in range(30):
                save_json(path, {"schema": 1, "of": [writer] * (2000 * (writer + 1))})
        except Exception as error:
            errors.append(error)

    def read():
        while not done.is_set():
            found = device_files.read_entries(
                path, 1, "of", lambda entry: (entry, None), instead="it is not", command="nothing"
            )
            if len(found) > 1:
                errors.append(found)
            seen.update(found)

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    reader = threading.Thread(target=read)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that is ignored
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join(60)
        done.set()
        reader.join(60)
    assert not errors and seen <= set(range(4)) and seen
    assert os.listdir(tmp_path) == [path.name]


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
    """Two processes whose hashes are seeded otherwise."""
    code = """
import hashlib, torch
import rir_kernels as rir
torch.set_num_threads(1)
digest = hashlib.sha256()
for impl in ("torch", "triton"):
    torch.manual_seed(0)
    layer, x = rir.ConvBNAct(8, 8, 1, impl=impl), torch.randn(1, 8, 2, 2, requires_grad=True)
    y = layer(x)
    for tensor in (y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]), *layer.buffers()):
        digest.update(tensor.detach().contiguous().numpy().tobytes())
print(digest.hexdigest())
"""
    found = set()
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.add(run_python(code, interpret="1"))
    assert len(found) == 1


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


# 49: state


def test_row_49_state_that_does_not_fit_a_fused_model():
    """Same errors, same lists of keys as without fuse_."""
    state = resnet().state_dict()
    state["extra"] = state.pop("layer1.0.conv1.weight")
    errors = []
    for model in resnet_twins():
        with pytest.raises(RuntimeError, match=r"Missing key.*conv1") as error:
            model.load_state_dict(state)
        errors.append(str(error.value).partition("\n")[2])
        assert model.load_state_dict(state, strict=False) == (["layer1.0.conv1.weight"], ["extra"])
        with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):
            model.load_state_dict({"conv1.weight": torch.zeros(1, 3, 3, 3)}, strict=False)
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["resnet", "RiRBlock", "ConvBNAct"])
def test_row_49_state_from_before_batches_were_counted(name):
    """nn.BatchNorm2d knows them by the version in the metadata, or by its absence; the counters stay as they are."""
    model = resnet_twins()[0] if name == "resnet" else settle(BLOCKS[name]())
    current = copy.deepcopy(model.state_dict())
    old = type(current)((key, value) for key, value in current.items() if not key.endswith("tracked"))
    old._metadata = current._metadata
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        model.load_state_dict(old)  # with today's metadata
    aged = {path: versions | {"version": 1} for path, versions in current._metadata.items()}
    for metadata in (aged, None):
        old._metadata = metadata
        assert model.load_state_dict(old) == ([], [])
        for key, value in current.items():
            assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["RiRBlock", "ConvBNAct"])
def test_row_49_state_that_does_not_fit_our_modules(name):
    """torch's errors and lists of keys, and nothing is loaded under strict."""
    module = BLOCKS[name]()
    key = next(key for key in module.state_dict() if key.endswith("bn.running_var"))
    state = copy.deepcopy(module.state_dict())
    state["extra"] = state.pop(key)
    with pytest.raises(RuntimeError, match=rf"(?s)Missing key.*{key}.*Unexpected key.*extra"):
        module.load_state_dict(state)
    assert module.load_state_dict(state, strict=False) == ([key], ["extra"])
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
        module.load_state_dict({key: torch.zeros(1)}, strict=False)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ["RiRBlock", "ConvBNAct"])
def test_row_49_casts_are_those_of_a_batch_norm(name, cast):
    """Floats are cast, the counter stays int64, and a state in another dtype is cast as it is loaded."""
    module, norm = settle(BLOCKS[name]()).float(), nn.BatchNorm2d(4)
    state = copy.deepcopy(module.state_dict())
    CASTS[cast](module), CASTS[cast](norm)
    dtypes = {key: t.dtype for key, t in norm.state_dict().items()}
    for key, tensor in module.state_dict().items():
        assert tensor.dtype == dtypes.get(key.rpartition(".")[2], dtypes["weight"])
        assert torch.equal(tensor, state[key].to(tensor.dtype)), key
        assert tensor.dim() < 4 or cast != "channels_last" or tensor.is_contiguous(memory_format=torch.channels_last)
    doubled = {key: 2 * t for key, t in state.items()}
    module.load_state_dict(doubled)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, doubled[key].to(tensor.dtype)) and tensor.dtype == dtypes.get(
            key.rpartition(".")[2], dtypes["weight"]
        )


# 50: checkpoints of somebody else

DESCRIPTION = {
    "name": "rir18_thin", "num_classes": 10, "in_channels": 1, "options": {"depth": [1, 1, 1]}, "quantize": None,
    "dtype": "float32", "layers": "packed",
}  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    return build.sectioned("model", build.network(DESCRIPTION).state_dict())


class _Watched(TorchDispatchMode):
    """Notes, and refuses, what takes more than 4 MiB."""

    def __init__(self):
        super().__init__()
        self.large = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "empty" in operator.name() and str(kwargs.get("device")) != "meta":
            size = args[0] if isinstance(args[0], (list, tuple)) else args[0].shape
            if prod(size) > 2**20:
                self.large.append((operator.name(), size))
                raise MemoryError(size)
        return operator(*args, **kwargs)


def _rejected(path, match):
    with _Watched() as watched, pytest.raises(CheckpointError, match=match):
        build.load(path)
    assert not watched.large


def test_row_50_a_good_checkpoint_is_loaded(tmp_path, weights):
    """What the others are rejected beside; bit for bit."""
    checkpoint.save(tmp_path / "file", weights, {"model": DESCRIPTION})
    model, _ = build.load(tmp_path / "file")
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[f"model.{name}"])


NO_NETWORK, ANOTHER = "no network can be built", "a checkpoint of another model"
OVERSIZED = {
    "classes": ({"num_classes": 10**8}, ANOTHER), "more classes than numbers": ({"num_classes": 10**30}, NO_NETWORK),
    "channels": ({"in_channels": 10**8}, ANOTHER), "the wide one": ({"name": "rir18_wide"}, ANOTHER),
    "blocks": ({"options": {"depth": [10**9, 1, 1]}}, NO_NETWORK),
    "a block too many": ({"options": {"depth": [2, 1, 1]}}, ANOTHER),
    "layers": ({"options": {"depth": [1, 1, 1], "layers_per_block": 10**9}}, NO_NETWORK),
    "depth of another type": ({"options": {"depth": "aaa"}}, NO_NETWORK),
    "options of another type": ({"options": [1]}, NO_NETWORK), "unknown option": ({"options": {"x": 1}}, NO_NETWORK),
    "name of another type": ({"name": ["rir18_thin"]}, NO_NETWORK), "a path": ({"name": "../../x"}, NO_NETWORK),
    "a function for a dtype": ({"dtype": "load"}, NO_NETWORK), "no such dtype": ({"dtype": "x"}, NO_NETWORK),
    "negative": ({"num_classes": -1}, NO_NETWORK), "not a number": ({"num_classes": float("nan")}, NO_NETWORK),
    "bits of another type": ({"quantize": 4}, NO_NETWORK), "no such bits": ({"quantize": "W9A9"}, NO_NETWORK),
    "another dtype": ({"dtype": "float64"}, ANOTHER), "missing": (None, NO_NETWORK), "a list": ([], NO_NETWORK),
}  # fmt: skip


@pytest.mark.parametrize("kind", OVERSIZED)
def test_row_50_what_it_says_of_the_network_is_not_believed(tmp_path, weights, kind):
    """A network that the tensors in the file are not those of is refused before it is built."""
    change, match = OVERSIZED[kind]
    facts = {"model": DESCRIPTION | change} if isinstance(change, dict) else {} if change is None else {"model": change}
    checkpoint.save(tmp_path / "file", weights, facts)
    _rejected(tmp_path / "file", match)


def _raw(path, header, data=b"", length=None, size=None):
    """A safetensors file as somebody may write it by hand; size: with a hole at its end."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    if size is not None:
        os.truncate(path, 8 + len(text) + size)


FACTS = json.dumps({"format": checkpoint.FORMAT, "model": DESCRIPTION})


def _header(shape, end, dtype="F32", start=0, **more):
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return {"__metadata__": {"rir_kernels": FACTS}, "model.x": tensor, **more}


HEADERS = {
    "length of an exabyte": ({"header": b"{}", "length": 2**60}, "not a whole"),
    "length of a gigabyte": ({"header": b"{}", "length": 2**30, "size": 2**30}, "not a whole"),
    "no JSON": ({"header": b"{" * 1000}, "not a whole"),
    "deep": ({"header": b"[" * 100_000}, "not a whole"),
    "shape beyond the data": ({"header": _header([2**40], 4), "data": b"abcd"}, "not a whole"),
    "data beyond the file": ({"header": _header([2**40], 2**42), "data": b"abcd"}, "not a whole"),
    "shape that overflows": ({"header": _header([2**62, 2**62], 4), "data": b"abcd"}, "not a whole"),
    "negative shape": ({"header": _header([-1], 4), "data": b"abcd"}, "not a whole"),
    "negative start": ({"header": _header([2], 4, start=-4), "data": b"abcd"}, "not a whole"),
    "shape of another type": ({"header": _header("aa", 4), "data": b"abcd"}, "not a whole"),
    "unknown type": ({"header": _header([1], 4, "OBJECT"), "data": b"abcd"}, "not a whole"),
    "type that no network has": ({"header": _header([4], 4, "F8_E4M3"), "data": b"abcd"}, "no network here has"),
    "deep facts": ({"header": {"__metadata__": {"rir_kernels": "[" * 100_000}}}, "but not one that"),
    "facts of 5000 digits": ({"header": {"__metadata__": {"rir_kernels": "1" * 5000}}}, "but not one that"),
    "facts of another type": ({"header": {"__metadata__": {"rir_kernels": 1}}}, "not a whole"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_row_50_headers_that_lie(tmp_path, kind):
    """Refused by the header alone."""
    raw, match = HEADERS[kind]
    _raw(tmp_path / "file", **raw)
    _rejected(tmp_path / "file", match)


@pytest.mark.parametrize("values", [2**26, 2**34])
def test_row_50_one_tensor_of_a_good_file_is_a_hole(tmp_path, weights, values):
    """Of 256 MiB, and of 64 GiB, which some systems map and others do not: told by the header, and never read."""
    header, end = {"__metadata__": {"rir_kernels": FACTS}}, 0
    names = {torch.float32: "F32", torch.int64: "I64"}
    for name, value in weights.items():
        shape = [values] if name == "model.head.conv.weight" else list(value.shape)
        start, end = end, end + prod(shape) * value.element_size()
        header[name] = {"dtype": names[value.dtype], "shape": shape, "data_offsets": [start, end]}
    _raw(tmp_path / "file", header, size=end)
    other = rf"another model: head\.conv\.weight is torch\.float32 \({values},\)"
    _rejected(tmp_path / "file", other if values == 2**26 else f"{other}|not a whole")


def test_row_50_pickles_are_not_looked_into(tmp_path):
    """Nothing of the file is executed."""
    torch.save({"model": _Executed(tmp_path / "marker")}, tmp_path / "file")
    _rejected(tmp_path / "file", "not a whole safetensors file")
    (tmp_path / "file").write_bytes(pickle.dumps(_Executed(tmp_path / "marker")))
    _rejected(tmp_path / "file", "not a whole safetensors file")
    assert not (tmp_path / "marker").exists()
