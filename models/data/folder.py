"""Images in folders: train/<class>/ and test/<class>/, or val/<class>/."""

from pathlib import Path

import numpy as np

from .decoding import decode
from .images import DataError, Images, assemble, choose

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def read(root: Path, *, train_images, test_images, image_size, seed) -> Images:
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not tests:
        raise DataError(f"{root} has a folder train but no test part: add a folder test or val, of the same classes")
    found = {"train": _images(root / "train"), "test": _images(tests[0])}
    classes = sorted(found["train"])
    if unknown := sorted(found["test"].keys() - found["train"].keys()):
        raise DataError(f"{tests[0] / unknown[0]} is of no class that is in {root / 'train'}: rename or remove it")
    parts = []
    for split, wanted in (("train", train_images), ("test", test_images)):
        files = [(file, classes.index(name)) for name, files in sorted(found[split].items()) for file in files]
        files = [files[row] for row in choose(len(files), wanted, seed)]
        x, _ = decode(((str(file), file) for file, _ in files), image_size)
        parts.append((x, np.array([label for _, label in files], np.int64)))
    return assemble(f"the folder {root.name}", classes, *parts)


def _images(part: Path) -> dict[str, list[Path]]:
    """The images of each class, in the order of their names."""
    classes = {entry.name: entry for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if not classes:
        raise DataError(f"{part} holds no folders: make one for each class, with its images in it")
    found = {
        name: sorted(file for file in entry.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        for name, entry in classes.items()
    }
    if empty := sorted(name for name, files in found.items() if not files):
        raise DataError(f"{part / empty[0]} holds no images ({', '.join(sorted(_SUFFIXES))}): add some or remove it")
    return found
