"""CIFAR-10 and CIFAR-100 in the binary version: records of one or two bytes of labels and 3,072 of pixels."""

import gzip
import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .images import DataError, Images, assemble, choose

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MOST_IMAGES = 50_000  # in a file
_LARGEST_ARCHIVE = 256 << 20  # bytes, unpacked; both archives have 176 MiB
_PICKLES = ("cifar-10-batches-py", "cifar-100-python")
_ADVICE = "take the binary version, cifar-10-binary.tar.gz or cifar-100-binary.tar.gz"


@dataclass(frozen=True)
class _Kind:
    title: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int  # the last of them is the label
    classes: tuple[str, ...]


_KINDS = (
    _Kind(
        "CIFAR-10", "cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin",
        "batches.meta.txt", 1, CIFAR10,
    ),
    _Kind(
        "CIFAR-100", "cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2,
        tuple(str(i) for i in range(100)),
    ),
)  # fmt: skip


def recognized(folder: Path) -> bool:
    """Whether read_folder has something to read, or to refuse."""
    return bool(_places(folder)) or _is_pickles(folder)


def read_folder(folder: Path, **how) -> Images:
    """how: train_images, test_images and seed, as in models.data.load."""
    places = _places(folder)
    if not places:
        raise DataError(f"{folder} holds CIFAR in Python's pickle format, which could run code: {_ADVICE}")
    if len(places) > 1:
        raise DataError(f"{folder} holds both {' and '.join(kind.title for kind, _ in places)}: give the path of one")
    kind, place = places[0]
    sizes = {name: (place / name).stat().st_size for name in _names(kind) if (place / name).is_file()}
    _check_sizes(kind, sizes, place)
    return _read(kind, {name: (place / name).read_bytes() for name in sizes}, place, **how)


def read_archive(path: Path, **how) -> Images:
    """Nothing is written to disk, and of the archive's names none is followed: only members of known names are read."""
    try:
        with tarfile.open(fileobj=io.BytesIO(_unpacked(path)), mode="r:") as tar:
            members = tar.getmembers()
            folders = {member.name.removeprefix("./").partition("/")[0] for member in members}
            kind = next((kind for kind in _KINDS if kind.folder in folders), None)
            if kind is None:
                if folders & {*_PICKLES}:
                    raise DataError(f"{path} holds CIFAR in Python's pickle format, which could run code: {_ADVICE}")
                raise DataError(f"{path} holds neither {' nor '.join(kind.folder for kind in _KINDS)}: {_ADVICE}")
            wanted = {f"{kind.folder}/{name}": name for name in _names(kind)}
            found = {}
            for member in members:
                name = wanted.get(member.name.removeprefix("./"))
                if name is None:
                    continue
                if not member.isreg() or name in found:
                    raise DataError(f"{path}: {member.name} is no plain file, or there twice: fetch it again")
                found[name] = member
            _check_sizes(kind, {name: member.size for name, member in found.items()}, path)
            files = {name: tar.extractfile(member).read() for name, member in found.items()}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged or no .tar.gz, {error}: fetch it again, or {_ADVICE}") from error
    return _read(kind, files, path, **how)


def _unpacked(path):
    opened = gzip.open if path.open("rb").read(2) == b"\x1f\x8b" else open
    with opened(path, "rb") as file:
        # tarfile would follow sizes that the archive states: a small file could ask for any amount of memory
        content = file.read(_LARGEST_ARCHIVE + 1)
    if len(content) > _LARGEST_ARCHIVE:
        raise DataError(f"{path} unpacks to more than {_LARGEST_ARCHIVE >> 20} MiB, which CIFAR does not: {_ADVICE}")
    return content


def _places(folder):
    """(kind, where its files are) of everything that is in `folder`."""
    return [
        (kind, place)
        for kind in _KINDS
        for place in (folder, folder / kind.folder)
        if any((place / name).is_file() for name in (*kind.train, kind.test))
    ]


def _is_pickles(folder):
    return any((folder / name).exists() for name in (*_PICKLES, "data_batch_1")) or (folder / "train").is_file()


def _names(kind):
    return (*kind.train, kind.test, kind.names)


def _check_sizes(kind, sizes, where):
    record = kind.label_bytes + _PIXELS
    for name in (*kind.train, kind.test):
        if name not in sizes:
            raise DataError(f"{where} has no {name}: {kind.title} is not complete, fetch it again")
        if sizes[name] == 0 or sizes[name] % record:
            raise DataError(
                f"{where}: {name} has {sizes[name]} bytes, which is not a number of {record}-byte records: it is "
                f"truncated or of another kind, fetch it again"
            )
    for name, size in sizes.items():
        if size > _MOST_IMAGES * record:
            raise DataError(f"{where}: {name} is oversized, {size} bytes, not {kind.title}'s: fetch it again")


def _read(kind, files, where, *, train_images, test_images, seed):
    classes = kind.classes
    if kind.names in files:
        classes = tuple(files[kind.names].decode("utf-8", "replace").split())
        if len(classes) != len(kind.classes):
            raise DataError(f"{where}: {kind.names} has {len(classes)} names, expected {len(kind.classes)}")
    parts = []
    for names, wanted in ((kind.train, train_images), ((kind.test,), test_images)):
        records = [_records(kind, files[name], f"{where}: {name}") for name in names]
        rows = np.concatenate(records)[choose(sum(map(len, records)), wanted, seed)]
        x = rows[:, kind.label_bytes :].reshape(-1, *_SHAPE)
        parts.append((x, rows[:, kind.label_bytes - 1].astype(np.int64)))
    return assemble(f"{kind.title} (binary version)", classes, *parts)


def _records(kind, content, where):
    """uint8 (N, bytes of a record), whose labels are known to be good"""
    records = np.frombuffer(content, np.uint8).reshape(-1, kind.label_bytes + _PIXELS)
    labels, count = records[:, kind.label_bytes - 1], len(kind.classes)
    if len(bad := np.flatnonzero(labels >= count)):
        raise DataError(
            f"{where}, record {bad[0]}: label {labels[bad[0]]} is out of range, {kind.title}'s are 0 to {count - 1}: "
            f"fetch it again"
        )
    return records
