"""A moving average of a network's weights and statistics, which is what is evaluated and kept at the end."""

import copy

import torch
from torch import nn


class Average:
    """average <- d * average + (1 - d) * model, with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of the first steps lets the random start be forgotten. Parameters and floating-point buffers are
    averaged, other buffers (counters) are copied. `model`: an independent copy in eval mode, without gradients.

    torch.optim.swa_utils.AveragedModel does the same, and reads its step from the device at every update.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """step: number of updates made before this one."""
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        floats = [(ours, theirs) for ours, theirs in pairs if ours.is_floating_point()]
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([ours for ours, _ in floats], [theirs for _, theirs in floats], 1 - decay)
        for ours, theirs in pairs:
            if not ours.is_floating_point():
                ours.copy_(theirs)


def _tensors(model):
    return [*model.parameters(), *model.buffers()]
