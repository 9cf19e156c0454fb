"""RiRLayers and RiRBlocks as plain data, beside their four convolutions and two norms.

What `cases` draws has residuals that were handed in. Here the shortcut comes from the layer's own input, the streams
come packed or apart, and blocks have a shortcut of their own; rir.compare judges.
"""

import re
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn

import rir_kernels as rir
from tests.support.helpers import scrambled

from .cases import DTYPES, LAYOUTS, Written, out_size
from .judge import laid_out, repeatable

KERNELS, STRIDES = (3, 1), (1, 2)  # of our kernels
PARAMETERS = ("weight", "bn.weight", "bn.bias", "projection.weight")


@dataclass(frozen=True)
class LayerCase(Written):
    """One layer, or with `num_layers` a block, and one call of it.

    apart: None where the input comes packed, else how r and t lie: "side by side" in one buffer, or as LAYOUTS say.
    layout: of the packed input. frozen: those PARAMETERS of every layer that want no gradient.
    """

    num_layers: int | None
    outer_shortcut: str
    outer_streams: str
    batch: int
    size: tuple[int, int]
    channels: tuple[int, int]
    kernel_size: int
    stride: int
    residual_fraction: float
    shortcut: str
    branch_scale: float
    eps: float
    momentum: float | None
    training: bool
    dtype: str
    layout: str
    apart: tuple[str, str] | None
    frozen: tuple[str, ...]
    seed: int


@st.composite
def layer_cases(draw, by: str) -> LayerCase:
    """Small ones that are legal. by: a key of DTYPES."""
    kernels, strides = ((*KERNELS, 5), (*STRIDES, 3)) if by == "torch" else (KERNELS, STRIDES)
    kernel, stride = draw(st.sampled_from(kernels)), draw(st.sampled_from(strides))
    batch, size = draw(st.integers(1, 3)), draw(st.tuples(*[st.integers(1, 9)] * 2))
    channels = draw(st.tuples(*[st.one_of(st.integers(1, 8), st.sampled_from([15, 16, 17, 33]))] * 2))
    values = batch * out_size(size[0], kernel, stride, kernel // 2) * out_size(size[1], kernel, stride, kernel // 2)
    # a norm of a few values leaves of a gradient little but its rounding, and so does one of weights of a single number
    trainable = values > 7 and min(channels) * kernel**2 > 1
    layouts = [layout for layout in LAYOUTS if layout != "one image"]
    return LayerCase(
        num_layers=draw(st.sampled_from([None, 1, 2])),
        outer_shortcut=draw(st.sampled_from(["none", "pre_norm", "post_act"])),
        outer_streams=draw(st.sampled_from(["residual", "both"])),
        batch=batch,
        size=size,
        channels=channels,
        kernel_size=kernel,
        stride=stride,
        residual_fraction=draw(st.sampled_from([0.5, 0.0, 1.0, 0.3])),
        shortcut=draw(st.sampled_from(["pad", "projection", "none"])),
        branch_scale=draw(st.sampled_from([1.0, 0.5, -1.5])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0, None])),
        training=draw(st.booleans()) and trainable,
        dtype=draw(st.sampled_from(DTYPES[by])),
        layout=draw(st.sampled_from(layouts)),
        apart=draw(st.none() | st.just(("side by side",) * 2) | st.tuples(*[st.sampled_from(layouts)] * 2)),
        frozen=tuple(name for name in PARAMETERS if draw(st.booleans())),
        seed=draw(st.integers(0, 999)),
    )


@repeatable
def check_layer(case: LayerCase, impl: str, device) -> None:
    """AssertionError where `impl` is not, within rounding, what the naive layers are."""
    layer, x = build(case, impl)
    layer.to(device)
    naive = layer.to_reference()
    report = rir.compare(
        _Call(naive, case), _Call(layer, case), laid_out(x.to(device), case.layout), train=case.training
    )
    assert report.passed, str(report)


def build(case: LayerCase, impl: str):
    """(layer, packed input), on the CPU."""
    torch.manual_seed(case.seed)
    options = {"dtype": getattr(torch, case.dtype), "impl": impl}
    options |= {
        name: getattr(case, name)
        for name in ("kernel_size", "stride", "residual_fraction", "shortcut", "branch_scale", "eps", "momentum")
    }
    if case.num_layers is None:
        layer = rir.RiRLayer(*case.channels, **options)
    else:
        outer = {name: getattr(case, name) for name in ("num_layers", "outer_shortcut", "outer_streams")}
        layer = rir.RiRBlock(*case.channels, **outer, **options)
    for name, parameter in scrambled(layer).named_parameters():
        parameter.requires_grad_(re.sub(r"layers\.\d\.", "", name) not in case.frozen)
    return layer, torch.randn(case.batch, case.channels[0], *case.size).to(options["dtype"])


class _Call(nn.Module):
    """forward(packed x), which hands over the streams as the case has them."""

    def __init__(self, layer, case):
        super().__init__()
        self.layer, self.apart = layer, case.apart

    def forward(self, x):
        if self.apart is None:
            return self.layer(x)
        streams = x[:, : self.layer.in_residual], x[:, self.layer.in_residual :]
        if "side by side" in self.apart:
            return self.layer(*streams)
        return self.layer(*(laid_out(t, how, True) for t, how in zip(streams, self.apart, strict=True)))
