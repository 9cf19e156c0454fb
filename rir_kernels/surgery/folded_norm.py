"""The module that replaces a batch norm after folding."""

import torch
from torch import nn

from ..common.activations import RELU, Activation, activate


class FoldedNorm(nn.Module):
    """Computes y = x * weight + bias per channel, then the activation, if any; if weight and bias are None, y = x.

    x (N, C, H, W). To a fused operation it is, bit for bit, a batch norm in evaluation with statistics 0 and 1: it has
    what bn_state reads. train() leaves it in evaluation.
    """

    training = False
    track_running_stats = True
    num_batches_tracked = None
    momentum = 0.0
    eps = 1e-30  # 1 + eps is 1

    weight: torch.Tensor  # or None; then bias is None too
    bias: torch.Tensor

    def __init__(self, channels: int, weight=None, bias=None, *, activation: Activation | None, like: torch.Tensor):
        super().__init__()
        self.num_features = channels
        self.activation = activation
        for name, value in (("weight", weight), ("bias", bias)):
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))
        for name, value in (("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value, dtype=like.dtype, device=like.device), False)
        self.train(False)

    def forward(self, x):
        if self.weight is not None:
            weight, bias = (p.to(x.dtype).view(1, -1, 1, 1) for p in (self.weight, self.bias))
            x = torch.addcmul(bias, x, weight)
        return activate(x, self.activation)

    def __setstate__(self, state):
        if "relu" in state:  # pickled by version 0.1
            state = state | {"activation": RELU if state["relu"] else None}
        super().__setstate__(state)

    def train(self, mode: bool = True):
        return super().train(False)

    def extra_repr(self) -> str:
        return f"{self.num_features}, affine={self.weight is not None}, activation={self.activation}"
