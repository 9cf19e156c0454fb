"""One file holds all that a run is, and replaces the one before in one step.

A safetensors file: tensors by name, and beside them a JSON text with everything that is not a tensor. It is written
under another name, flushed to the disk and renamed over the old one, so that a reader, or a run that is killed at any
moment, meets the old file or the new one and never a part. Nothing is unpickled, ever.
"""

import contextlib
import errno
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from .errors import CheckpointError

FORMAT = 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KEY = "rir_kernels"  # of the JSON text within the header
# safetensors' names of what a run holds
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def save(path: str | Path, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """Replaces `path` by a file of these. CheckpointError where it cannot be written: the old file is kept then."""
    path = Path(path)
    draft = path.with_name(path.name + ".part")
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
    # safetensors needs dense CPU tensors that share no memory
    dense = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            file.write(serialize(dense, {_KEY: text}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        kept = "; the checkpoint before it is kept" if path.exists() else ""
        advice = ": make room" if error.errno in _FULL else ""
        raise CheckpointError(f"{path} could not be written ({error.strerror or error}){kept}{advice}") from error


def load(path: str | Path, part: str = "") -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, on the CPU, and facts) as they were handed to `save`. CheckpointError for anything but such a file.

    part: only the tensors whose names begin with it are read.
    """
    with _opened(path) as file:
        facts = _facts(path, file.metadata())
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(part)}, facts  # noqa: SIM118


def load_outline(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Of `load`, without reading the tensors: on the meta device they have names, shapes and dtypes alone."""
    with _opened(path) as file:
        facts, outline = _facts(path, file.metadata()), {}
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in _DTYPES:
                raise CheckpointError(f"{path}: {name} is of type {tensor.get_dtype()}, which no network here has")
            outline[name] = torch.empty(tensor.get_shape(), dtype=_DTYPES[tensor.get_dtype()], device="meta")
        return outline, facts


def load_facts(path: str | Path) -> dict:
    """Of `load`, without looking at the tensors."""
    with _opened(path) as file:
        return _facts(path, file.metadata())


@contextlib.contextmanager
def _opened(path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except CheckpointError:
        raise
    except (SafetensorError, OSError, RuntimeError) as error:  # the last is torch's, of a file too large to be mapped
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def _facts(path, metadata):
    try:
        facts = json.loads((metadata or {})[_KEY])
        found = facts["format"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: a safetensors file, but not one that `python -m models.train` wrote") from error
    if found != FORMAT:
        raise CheckpointError(f"{path}: of format {found}, and this version reads format {FORMAT}")
    return facts


def check_fits(path, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """CheckpointError that says what differs, unless names, shapes and dtypes are the same."""
    faults = [f"no {name}" for name in expected if name not in found]
    faults += [f"{name} is unknown" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        ours, theirs = expected[name], found[name]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            faults.append(f"{name} is {theirs.dtype} {tuple(theirs.shape)}, not {ours.dtype} {tuple(ours.shape)}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{path} is a checkpoint of another model: {'; '.join(sorted(faults)[:3])}{more}")


def _flush_folder(folder):
    """A rename lasts once its folder is on the disk; not every system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
