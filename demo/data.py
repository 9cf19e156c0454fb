"""Images to train on: scikit-learn's digits, or CIFAR-10 from parquet files."""

import io
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

_DIGITS_TRAIN = 1500  # of 1,797


@dataclass(frozen=True)
class Images:
    """Normalised images (N, C, H, W), fp32 and channels_last, and their labels (N,), in two parts."""

    name: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]

    def to(self, device) -> "Images":
        parts = (self.train_x, self.train_y, self.test_x, self.test_y)
        return Images(self.name, *(part.to(device) for part in parts))

    def batches(self, batch: int, steps: int, seed: int):
        """`steps` pairs (x, y) of the training part, which is shuffled anew each time it is used up."""
        count = len(self.train_x)
        if not 0 < batch <= count:
            raise ValueError(f"a batch has 1 to {count} images here, got {batch}")
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < batch:
                order = torch.randperm(count, generator=generator)
            rows, order = order[:batch].to(self.train_x.device), order[batch:]
            yield self.train_x[rows].contiguous(memory_format=torch.channels_last), self.train_y[rows]


def digits(seed: int = 0) -> Images:
    """The 1,797 images of 8x8 pixels that scikit-learn brings: handwritten digits, in ten classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images)[:, None].float() / 16
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return _normalised("scikit-learn's digits", (x[train], y[train]), (x[test], y[test]))


def cifar10(folder: str | Path, train_images: int, test_images: int) -> Images:
    """The first images of train-*.parquet and of test-*.parquet, with Hugging Face's columns for CIFAR-10.

    These are img = {bytes: an image file, path} and label. No more images are decoded than asked for; where the files
    hold fewer, all of them are taken.
    """
    train = _read(Path(folder), "train", train_images)
    test = _read(Path(folder), "test", test_images)
    return _normalised(f"parquet files of {train[2]} images, CIFAR-10's columns", train[:2], test[:2])


def _read(folder, split, count):
    """(images as (N, C, H, W) in 0..1, labels, the format the images were stored in)"""
    from PIL import Image

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"no {split}-*.parquet in {folder}")
    pixels, labels = [], []
    for row in islice(_rows(files), count):
        image = Image.open(io.BytesIO(row["img"]["bytes"]))
        pixels.append(np.asarray(image.convert("RGB")))
        labels.append(row["label"])
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return x, torch.tensor(labels), image.format


def _rows(files):
    from pyarrow.parquet import ParquetFile

    columns = ["img", "label"]
    for file in files:
        parquet = ParquetFile(file)
        if missing := [name for name in columns if name not in parquet.schema_arrow.names]:
            raise ValueError(f"{file} needs the columns img and label, and has no {' and no '.join(missing)}")
        for rows in parquet.iter_batches(batch_size=256, columns=columns):
            yield from rows.to_pylist()


def _normalised(name, train, test):
    """Mean 0 and deviation 1 in each channel of the training part; the test part with the same numbers."""
    (train_x, train_y), (test_x, test_y) = train, test
    std, mean = torch.std_mean(train_x, dim=(0, 2, 3), keepdim=True)

    def normalise(x):
        return ((x - mean) / std).contiguous(memory_format=torch.channels_last)

    return Images(name, normalise(train_x), train_y, normalise(test_x), test_y)
