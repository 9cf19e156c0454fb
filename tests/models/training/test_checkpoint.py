"""One file, whole or not at all; and what is said of files that are something else."""

import errno
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from models.training import checkpoint
from models.training.errors import CheckpointError

TENSORS = {
    "fp32": torch.tensor([1.5, float("nan"), float("inf"), -0.0]),
    "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "slice": torch.arange(20).view(4, 5)[:, 1:3],
    "scalar": torch.tensor(7),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "bf16": torch.randn(3).bfloat16(),
    "empty": torch.empty(0, 3),
}
FACTS = {"numbers": [0.1, 1e-300, 3], "words": "ä \n", "nothing": None}


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist() if tensor.dim() else tensor.item()


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "a" / "file", TENSORS, FACTS)
    tensors, facts = checkpoint.load(tmp_path / "a" / "file")
    assert {name: bits(t) for name, t in tensors.items()} == {name: bits(t) for name, t in TENSORS.items()}
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in TENSORS.items()
    }
    assert facts == FACTS | {"format": checkpoint.FORMAT} == checkpoint.load_facts(tmp_path / "a" / "file")
    assert os.listdir(tmp_path / "a") == ["file"]


def test_tensors_that_share_memory_are_kept_apart(tmp_path):
    whole = torch.arange(6.0)
    checkpoint.save(tmp_path / "file", {"whole": whole, "part": whole[2:], "again": whole}, {})
    tensors, _ = checkpoint.load(tmp_path / "file")
    assert tensors["part"].tolist() == [2, 3, 4, 5]
    assert tensors["again"].tolist() == whole.tolist()


def test_a_full_disk(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "file", TENSORS, FACTS)
    before = (tmp_path / "file").read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"file could not be written \(No space left on device\); the checkpoint"):
        checkpoint.save(tmp_path / "file", {"other": torch.ones(3)}, {})
    assert (tmp_path / "file").read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_may_not_grow(tmp_path):
    """No stand-in for the system: it refuses the bytes in the middle of the file, in a process of its own."""
    checkpoint.save(tmp_path / "file", TENSORS, FACTS)
    before = (tmp_path / "file").read_bytes()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
            checkpoint.save(tmp_path / "file", {"large": torch.ones(10_000)}, {})
        except CheckpointError as error:
            status = 0 if "could not be written (File too large)" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "file").read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


def test_nothing_there_and_a_folder(tmp_path):
    for load in (checkpoint.load, checkpoint.load_facts):
        with pytest.raises(CheckpointError, match="there is no such file"):
            load(tmp_path / "file")
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            load(tmp_path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_part_of_a_file(share, tmp_path):
    checkpoint.save(tmp_path / "file", TENSORS, FACTS)
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="file: not a whole safetensors file"):
        checkpoint.load(tmp_path / "file")


def test_other_files(tmp_path):
    path = tmp_path / "file"
    torch.save({"weight": torch.ones(3)}, path)  # a pickle: never looked into
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        checkpoint.load(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(
        CheckpointError, match=r"^\S*file: a safetensors file, but not one that `python -m models.train`"
    ):
        checkpoint.load(path)
    for text in ("no JSON", "[]", '{"format": 99}'):
        save_file({"weight": torch.ones(3)}, path, {"rir_kernels": text})
        with pytest.raises(CheckpointError, match=r"not one that|of format 99, and this version reads format 1"):
            checkpoint.load(path)


def test_what_does_not_fit_is_named():
    expected = {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(1)}
    checkpoint.check_fits("file", expected, {name: t.clone() for name, t in expected.items()})
    found = {"a": torch.ones(4), "b": torch.ones(2).double(), "d": torch.ones(1)}
    with pytest.raises(CheckpointError) as error:
        checkpoint.check_fits("file", expected, found)
    message = str(error.value)
    assert message.startswith("file is a checkpoint of another model: a is torch.float32 (4,), not torch.float32 (3,)")
    assert "b is torch.float64 (2,), not torch.float32 (2,)" in message
    assert message.endswith("and 1 more")
