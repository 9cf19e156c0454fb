"""Random crops, mirror images and small motions, made in batches on the device that holds the images.

All of an epoch's randomness is drawn beforehand, from its seed and its number alone. So a training that is resumed sees
the batches that it would have seen, without a generator's state having been kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from rir_kernels.common.memory_format import to_format

from .images import Jitter


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """What becomes of each image in an epoch: tensors (count,), where place i is for the i-th image to be taken.

    order: int64, which image that is. top, left: int64 in 0..2 * padding, where its crop begins in the padded image.
    mirror: bool, whether it is turned left to right. motion: fp32 (count, 2, 3), or None; a row is (a, b, c), and
    a * x + b * y + c is where the pixel at (x, y) is taken from: first row x, second y, in pixels from the middle.
    """

    order: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor
    mirror: torch.Tensor
    motion: torch.Tensor | None = None

    def to(self, device) -> "EpochPlan":
        """A copy whose tensors are on `device`."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return EpochPlan(*(None if tensor is None else tensor.to(device) for tensor in tensors))


def plan_epoch(
    count: int, *, seed: int, epoch: int, padding: int, flip: bool, jitter: Jitter | None = None
) -> EpochPlan:
    """The plan, on the CPU, for `count` images; the same arguments always give the same one.

    seed, epoch: both at least 0; any two pairs have unrelated plans. padding: pixels, 0 for no crops. flip: whether
    about half of the images are mirrored. jitter: each image's shifts, turn and zoom are uniform within its limits.
    ValueError for a number out of range.
    """
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("epoch", epoch, 0), ("padding", padding, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    # seed + epoch would give the second epoch of one seed to the first of the next
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(mixed))
    order = torch.randperm(count, generator=generator)
    top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    mirror = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count, dtype=torch.bool)
    motion = None if jitter is None else _motion(jitter, 2 * torch.rand(4, count, generator=generator) - 1)
    return EpochPlan(order, top, left, mirror, motion)


def _motion(jitter, drawn):
    turn, zoom = drawn[0] * math.radians(jitter.turn), 1 + drawn[1] * jitter.zoom
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    x, y = drawn[2:] * jitter.shift
    return torch.stack([cos, -sin, x, sin, cos, y], 1).view(-1, 2, 3)


def batch(
    x: torch.Tensor, y: torch.Tensor, plan: EpochPlan, start: int, stop: int, *, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images start..stop - 1 of the plan's order, padded with zeros, cropped, mirrored and moved, and their labels.

    x: uint8 (N, C, H, W); y: (N,); on the plan's device. Returns the same, of b = stop - start images (fewer at the end
    of the plan). padding: the plan's. Nothing waits for the device.
    """
    height, width = x.shape[2:]
    images = F.pad(x[plan.order[start:stop]], (padding,) * 4)
    rows = torch.arange(height, device=x.device) + plan.top[start:stop, None]  # [b, H]
    columns = torch.arange(width, device=x.device)
    columns = torch.where(plan.mirror[start:stop, None], width - 1 - columns, columns) + plan.left[start:stop, None]
    # one gather of whole planes: five times as fast on a CPU as indexing rows and columns
    pixels = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).flatten(1)  # [b, H * W]
    found = images.flatten(2).gather(2, pixels[:, None].expand(-1, x.shape[1], -1))
    found = found.view(-1, *x.shape[1:])
    return found if plan.motion is None else _moved(found, plan.motion[start:stop]), y[plan.order[start:stop]]


def _moved(x, motion):
    """uint8 images (b, C, H, W), interpolated between four pixels; beyond the edges there is zero."""
    height, width = x.shape[2:]
    down = (torch.arange(height, device=x.device) - (height - 1) / 2)[:, None]
    right = torch.arange(width, device=x.device) - (width - 1) / 2
    (xx, xy, x0), (yx, yy, y0) = motion[..., None, None].permute(1, 2, 0, 3, 4)
    # grid_sample counts from -1 to 1, from edge to edge
    places = [(xx * right + xy * down + x0) * (2 / width), (yx * right + yy * down + y0) * (2 / height)]
    return F.grid_sample(x.float(), torch.stack(places, -1), align_corners=False).round_().to(torch.uint8)


def normalise(
    x: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> torch.Tensor:
    """(x - mean) / std of each channel, computed in fp32 and returned in `dtype` and that memory format.

    x: uint8 (N, C, H, W); mean, std: (C,), on x's device. A channel that never varies (std 0) becomes 0.
    """
    mean, std = (values.float().view(-1, 1, 1) for values in (mean, std))
    scaled = x.float().sub_(mean).div_(torch.where(std > 0, std, 1.0))
    return to_format(scaled.to(dtype), channels_last)  # .to(memory_format=...) would leave grey images as they lie


def test_batches(x: torch.Tensor, y: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All pairs (x, y) in order, `size` at a time; the last batch may be smaller. ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"a batch has at least 1 image, got size={size}")
    return zip(x.split(size), y.split(size), strict=True)
