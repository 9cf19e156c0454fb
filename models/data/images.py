"""What a data set is here, and what is raised for one that cannot be read."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch


class DataError(ValueError):
    """A data set that cannot be read: which file, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Jitter:
    """How far a training image may be moved, either way. shift: pixels, or parts; turn: degrees; zoom: part of 1."""

    shift: float
    turn: float
    zoom: float


@dataclass(frozen=True, eq=False)
class Images:
    """Two parts of a data set. train_x, test_x: uint8 (N, C, H, W); train_y, test_y: int64 (N,), places in `classes`.

    name: a line that says what it is. padding: by how many pixels a random crop may shift an image. flip: whether
    mirrored images are images of the same class, as photographs are and writing is not. jitter: for images so small
    that a whole pixel is a long way.
    """

    name: str
    classes: tuple[str, ...]
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    padding: int
    flip: bool
    jitter: Jitter | None = None

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def mean(self) -> torch.Tensor:
        """Of each channel of train_x, in units of its uint8 values: fp64 (C,), on its device."""
        return self._moments[0]

    @property
    def std(self) -> torch.Tensor:
        """The deviation (over N, not N - 1) of each channel, as `mean` is."""
        return self._moments[1]

    @cached_property
    def _moments(self):
        # whole numbers until the last division: exact, so the same on every device and for every chunk size
        total = torch.zeros(self.channels, dtype=torch.long, device=self.train_x.device)
        squares = torch.zeros_like(total)
        for chunk in self.train_x.split(1000):
            chunk = chunk.int()
            total += chunk.sum((0, 2, 3))
            squares += (chunk * chunk).sum((0, 2, 3))
        count = self.train_x.numel() // self.channels
        pairs = list(zip(total.tolist(), squares.tolist(), strict=True))
        mean = [t / count for t, _ in pairs]
        std = [(count * s - t * t) ** 0.5 / count for t, s in pairs]
        return tuple(torch.tensor(v, dtype=torch.float64, device=self.train_x.device) for v in (mean, std))

    @cached_property
    def fingerprint(self) -> dict:
        """What tells two data sets apart, as plain data: name, counts, scale, and a hash of pixels and labels."""
        digest = hashlib.sha256()
        for name in _TENSORS:
            tensor = getattr(self, name).cpu().contiguous()
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy())
        return {
            "name": self.name,
            "train": len(self.train_y),
            "test": len(self.test_y),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "sha256": digest.hexdigest()[:16],
        }

    def to(self, device) -> "Images":
        """These with their tensors on `device`: themselves where they are there."""
        if self.train_x.device == torch.empty(0, device=device).device:  # "cuda" is the current one of several
            return self
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})


_TENSORS = ("train_x", "train_y", "test_x", "test_y")


def assemble(name, classes, train, test, flip=None) -> Images:
    """train, test: pairs of uint8 (N, C, H, W) and int64 (N,), in numpy. flip: None for "where there are colours"."""
    parts, channels = (train, test), max(train[0].shape[1], test[0].shape[1])
    if train[0].shape[2:] != test[0].shape[2:]:
        sizes = " and ".join(f"{x.shape[3]}x{x.shape[2]}" for x, _ in parts)
        raise DataError(f"{name}: images for training and for testing have unlike sizes, {sizes}: give image_size")
    tensors = []
    for x, y in parts:
        if x.shape[1] < channels:
            x = x.repeat(channels, axis=1)  # the grey part of two
        tensors += [torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y)]
    padding = min(train[0].shape[2:]) // 8  # 4 of CIFAR's 32, as is usual
    return Images(name, tuple(classes), *tensors, padding, channels == 3 if flip is None else flip)


def choose(count: int, wanted: int | None, seed: int) -> np.ndarray:
    """Which of `count` images to take: int64, ascending. A larger `wanted` adds to what a smaller one takes."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted])
