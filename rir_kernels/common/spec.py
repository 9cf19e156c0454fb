"""The static description of one fused operation: everything that is not a tensor."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from .activations import RELU, Activation, by_sign, normal_form


@dataclass(frozen=True)
class ConvBNActSpec:
    """z = branch_scale * conv(x) + residual, y = act(norm(z)); with `post_norm`, scale and residual follow the norm.

    `shortcut_channels`: how many leading channels of x, subsampled by the stride, are added before the norm. It is a
    number rather than a tensor so that backward can add dz to dx inside the data-gradient kernel.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    shortcut_channels: int = 0
    post_norm: bool = False
    branch_scale: float = 1.0
    eps: float = 1e-5
    activation: Activation | None = RELU

    def output_shape(self, x: torch.Tensor, weight: torch.Tensor | None) -> tuple[int, int, int, int]:
        """(N, C_out, H', W') for x (N, C_in, H, W) and weight (C_out, C_in/groups, kh, kw) or None (x's shape)."""
        if weight is None:
            n, c, h, w = x.shape
            return n, c, h, w
        h, w = (
            (size + 2 * pad - dilation * (k - 1) - 1) // stride + 1
            for size, pad, dilation, k, stride in zip(
                x.shape[2:], self.padding, self.dilation, weight.shape[2:], self.stride, strict=True
            )
        )
        return x.shape[0], weight.shape[0], h, w

    @property
    def has_conv_options(self) -> bool:
        """Whether any convolution option is set; without a convolution none may be."""
        geometry = self.stride, self.padding, self.dilation, self.groups, self.shortcut_channels
        return geometry != ((1, 1), (0, 0), (1, 1), 1, 0)

    @property
    def conv_scale(self) -> float:
        """The factor on the convolution."""
        return 1.0 if self.post_norm else self.branch_scale

    @property
    def norm_scale(self) -> float:
        """The factor on the normed output."""
        return self.branch_scale if self.post_norm else 1.0

    @property
    def determined_by_z(self) -> bool:
        """Whether z gives the derivative of the activation, if no residual follows the norm."""
        return self.norm_scale == 1.0 or (self.norm_scale > 0 and by_sign(self.activation))

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """The part of x that is added before the norm, as a view."""
        if x.shape[1] != self.shortcut_channels:
            x = x[:, : self.shortcut_channels]
        return x if self.stride == (1, 1) else x[:, :, :: self.stride[0], :: self.stride[1]]


_kept = functools.lru_cache(maxsize=1024, typed=True)(ConvBNActSpec)


def kept_spec(*args, **options) -> ConvBNActSpec:
    """Returns ConvBNActSpec(...), cached for equal options of the same types."""
    # torch.compile traces through the cache, and warns of it
    return ConvBNActSpec(*args, **options) if torch.compiler.is_compiling() else _kept(*args, **options)


def spec_of_conv(conv: torch.nn.Conv2d, residual_at, branch_scale, activation, eps) -> ConvBNActSpec:
    """The spec of a Conv2d (numeric zero padding) followed by a norm with that eps."""
    geometry: Any = conv  # pairs, which torch's type hints do not say
    return kept_spec(
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=conv.groups,
        post_norm=residual_at == "post_norm",
        branch_scale=branch_scale,
        eps=eps,
        activation=normal_form(activation),
    )
