"""Files about a device that somebody else wrote.

The number in a test's name is that of the fault in docs/faults.md.
"""

import copy
import functools
import itertools
import json
import os
import pickle
import stat
import threading
import warnings

import pytest

from rir_kernels.common import device_tables
from rir_kernels.dispatch import choices
from rir_kernels.triton.tiling import measured
from tests.bench.test_tune import DEVICE, PROBLEM, WGRAD_PROBLEM, wgrad_written, written
from tests.repository.test_imports import run_python
from tests.support.hostile import Executed
from tooling.files import save_json

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
    _path(folder).write_bytes(pickle.dumps(Executed(folder / "marker"), 0))
    _ignored(field)
    assert not (folder / "marker").exists()


@readers
@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
def test_row_44_files_of_others(folder, field, monkeypatch):
    """What anybody else could have written is ignored; what belongs to root or to the code's owner is read."""
    _good(folder, field)
    path, code = _path(folder), os.stat(device_tables.__file__)
    assert READERS[field]() is not None

    path.chmod(0o666)
    if not code.st_mode & stat.S_IWOTH:  # else whoever may write the file may write the code
        assert "everyone may write to it" in _ignored(field)
    path.chmod(0o644)

    real = os.fstat
    for owner in {0, os.geteuid(), code.st_uid, 54321}:
        found = os.stat_result([*real(os.open(path, os.O_RDONLY))[:4], owner, *path.stat()[5:10]])
        monkeypatch.setattr(device_tables.os, "fstat", lambda handle, found=found: found)
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
        monkeypatch.setattr(device_tables, "MOST_BYTES", 1000)
        path.write_text('{"schema": 1, "FIELD": []}'.replace("FIELD", field) + " " * 1000)
    assert ("more than 1000 bytes" if kind == "large" else "not a file") in _ignored(field)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "..", "C:\\x", "n\0l", ""])
def test_row_44_names_of_devices_are_no_paths(name):
    """What a driver calls its device cannot lead out of the folder."""
    assert not set(device_tables.slug(name)) & set("/\\.:\0")


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


def test_row_44_a_home_that_triton_cannot_write(monkeypatch):
    """Kernels are compiled all the same, into a folder of the process's own, with one warning."""
    for variable in ("HOME", "TRITON_HOME"):
        monkeypatch.setenv(variable, "/proc/there/is/none")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    code = """
import os, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from rir_kernels.triton import inspect
    from rir_kernels.triton.launch import runtime
print(*(str(w.message) for w in caught if "compiled kernels" in str(w.message)), sep="|")
folder = os.environ["TRITON_CACHE_DIR"]
print(oct(os.stat(folder).st_mode & 0o777), os.listdir(folder))
import shutil; shutil.rmtree(folder)
"""
    said, folder = run_python(code).splitlines()
    assert "cannot be kept (" in said and "set TRITON_CACHE_DIR" in said and "|" not in said
    assert folder == "0o700 []"


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
            found = device_tables.read_entries(
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
