"""What models.data reads, as the demo trains on it: normalised once, without augmentation, in shuffled batches."""

from dataclasses import dataclass, replace

import torch

import models.data
from models.data.augment import normalise


@dataclass(frozen=True)
class Images:
    """Normalised images (N, C, H, W), fp32 and channels_last, and their labels (N,), in two parts."""

    name: str
    num_classes: int
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]

    def to(self, device) -> "Images":
        parts = ("train_x", "train_y", "test_x", "test_y")
        return replace(self, **{part: getattr(self, part).to(device) for part in parts})

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


def load(source, train_images: int | None = None, test_images: int | None = None) -> Images:
    """What models.data.load finds at `source`: each channel with mean 0 and deviation 1 in the training part."""
    found = models.data.load(source, train_images=train_images, test_images=test_images)
    train_x, test_x = (normalise(x, found.mean, found.std) for x in (found.train_x, found.test_x))
    return Images(found.name, found.num_classes, train_x, found.train_y, test_x, found.test_y)
