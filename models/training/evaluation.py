"""How good a network is on the test part of its data."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.data.augment import normalise, test_batches

from .ranks import Ranks

_BATCH = 1000  # images


@dataclass(frozen=True)
class Score:
    """loss: mean cross-entropy; accuracy: percent."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, images, scale, *, precision: str = "fp32", ranks: Ranks | None = None) -> Score:
    """Of `model` in eval mode on images.test_x, which lie on its device; its mode is put back. Ranks share the images.

    scale: (mean, deviation) of each channel, by which pixels are normalised: those of what it was trained on.
    """
    ranks = ranks or Ranks()
    training = model.training
    model.eval()
    x, y = images.test_x[ranks.rank :: ranks.world], images.test_y[ranks.rank :: ranks.world]
    total = torch.zeros(2, dtype=torch.float64, device=x.device)
    for some_x, some_y in test_batches(x, y, _BATCH):
        scores = forward(model, some_x, scale, precision)
        total[0] += F.cross_entropy(scores, some_y, reduction="sum")
        total[1] += (scores.argmax(1) == some_y).sum()
    model.train(training)
    loss, right = (ranks.sum(total) / len(images.test_y)).tolist()
    return Score(loss, 100 * right)


def forward(model: nn.Module, x: torch.Tensor, scale, precision: str, *, channels_last=True) -> torch.Tensor:
    """uint8 images (N, C, H, W) -> scores (N, classes), fp32 or fp64."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    x = normalise(x, *scale, dtype=dtype, channels_last=channels_last)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        scores = model(x)
    return scores.to(dtype)
