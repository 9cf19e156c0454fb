"""Images in parquet files, in Hugging Face's schema."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .binary import CIFAR10
from .decoding import decode
from .images import DataError, Images, assemble, choose

_IMAGES, _LABELS = ("img", "image"), ("label", "fine_label")  # names of columns
_MOST_CLASSES = 100_000  # where nothing says how many there are
_BATCH = 1024  # rows


def read(folder: Path, *, train_images, test_images, image_size, seed) -> Images:
    files = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in ("train", "test")}
    for split, found in files.items():
        if not found:
            raise DataError(f"{folder} has no {split}-*.parquet: both train-*.parquet and test-*.parquet must be there")
    image, label, names = _columns(files["train"][0])
    labels = {split: [_labels(file, image, label) for file in found] for split, found in files.items()}
    title, classes = _classes(folder, image, label, names, labels["train"])
    parts, formats = [], set()
    for split, wanted in (("train", train_images), ("test", test_images)):
        for file, values in zip(files[split], labels[split], strict=True):
            _check_range(file, label, values, len(classes))
        values = np.concatenate(labels[split])
        if not len(values):
            raise DataError(f"{files[split][0]} has no rows: there are no images in the {split} part")
        rows = choose(len(values), wanted, seed)
        x, met = decode(_image_files(files[split], map(len, labels[split]), image, rows), image_size)
        parts.append((x, values[rows]))
        formats |= met
    how = "JPEG re-encoded" if formats == {"JPEG"} and title.startswith("CIFAR") else ", ".join(sorted(formats))
    return assemble(f"{title} ({how})", classes, *parts)


@contextmanager
def _opened(file):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as opened:
            yield opened
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is damaged or no parquet file, {error}: fetch it again") from error


def _columns(file):
    """The columns of images and of labels, and the classes' names where the file holds them (else None)."""
    with _opened(file) as opened:
        schema = opened.schema_arrow
    image = next((name for name in _IMAGES if name in schema.names), None)
    label = next((name for name in _LABELS if name in schema.names), None)
    if image is None or label is None:
        wanted = " or ".join(_IMAGES if image is None else _LABELS)
        raise DataError(f"{file} has no column {wanted}, only {', '.join(schema.names)}: rename the one that is meant")
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        names = tuple(str(name) for name in described["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        names = None  # they are a courtesy
    return image, label, names


def _labels(file, image, label):
    """Those of every row, int64 (N,): no labels may be missing or negative."""
    from pyarrow import types

    with _opened(file) as opened:
        schema = opened.schema_arrow
        if missing := [name for name in (image, label) if name not in schema.names]:
            raise DataError(f"{file} has no column {missing[0]}, as the first file for training has: add it")
        kind = schema.field(image).type
        content = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else None
        # text would be taken for the path of a file
        if content is None or not (types.is_binary(content) or types.is_large_binary(content)):
            raise DataError(f"{file}: column {image} must be {{bytes, path}}, as Hugging Face has it, not {kind}")
        if not types.is_integer(schema.field(label).type):
            raise DataError(f"{file}: column {label} must hold integers, not {schema.field(label).type}")
        column = opened.read(columns=[label]).column(label)
    if column.null_count:
        row = np.flatnonzero(column.is_null().to_numpy())[0]
        raise DataError(f"{file}, row {row}: {label} is null: remove the row or label it")
    return column.to_numpy().astype(np.int64)


def _classes(folder, image, label, names, labels):
    """What the data set is called, and its classes."""
    if label == "fine_label":
        return "CIFAR-100", names or [str(i) for i in range(100)]
    if image == "img" and names in (None, CIFAR10):
        return "CIFAR-10", CIFAR10  # nothing but CIFAR calls its images so
    largest = max((values.max() for values in labels if len(values)), default=0)
    return folder.resolve().name, names or [str(i) for i in range(min(largest + 1, _MOST_CLASSES))]


def _check_range(file, label, values, count):
    if len(bad := np.flatnonzero((values < 0) | (values >= count))):
        row = bad[0]
        raise DataError(f"{file}, row {row}: {label} {values[row]} is out of range: it must be 0 to {count - 1}")


def _image_files(files, counts, image, rows):
    """(where it is, the bytes) of those rows, which are counted through all files."""
    start = 0
    for file, count in zip(files, counts, strict=True):
        wanted = rows[(rows >= start) & (rows < start + count)] - start
        start += count
        if len(wanted):
            yield from _rows_of(file, image, wanted)


def _rows_of(file, image, wanted):
    import pyarrow.compute as pc

    with _opened(file) as opened:
        start = 0
        for batch in opened.iter_batches(batch_size=_BATCH, columns=[image]):
            now = wanted[(wanted >= start) & (wanted < start + len(batch))]
            contents = pc.struct_field(batch.column(image), "bytes").take(now - start).to_pylist()
            for row, content in zip(now.tolist(), contents, strict=True):
                if content is None:
                    raise DataError(f"{file}, row {row}: {image} has no bytes: the images must be inside the file")
                yield f"{file}, row {row}", content
            start += len(batch)
            if start > wanted[-1]:
                return
