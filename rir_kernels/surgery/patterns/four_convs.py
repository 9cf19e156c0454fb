"""A generalized residual layer that is written as four convolutions and two norms: packed at each call, and run as one.

Weights and affine parameters are joined by differentiable copies, so every parameter gets its own gradient. The
running statistics are joined into temporaries, which are copied back when the operation has succeeded.
"""

from typing import NamedTuple

import torch
from torch import nn

from ... import norm_state
from ...spec import ConvBNActSpec
from ...streams import pack_weight
from ..guards import bypass_obstacle, conv_obstacle, padding_of, pair


class Layer(NamedTuple):
    """The modules by their names in the unit; None where a stream is absent."""

    convs: dict[str, nn.Conv2d | None]  # rr, rt, tr, tt
    norms: dict[str, nn.BatchNorm2d | None]  # r, t


def obstacle(layer: Layer) -> str:
    """Why the layer cannot run as one: a module that may not be bypassed, or modules that disagree."""
    convs, norms = ({name: m for name, m in group.items() if m is not None} for group in layer)
    for name, conv in convs.items():
        if reason := conv_obstacle(conv):
            return f"{name}: {reason}"
        if conv.groups != 1 or conv.bias is not None:
            return f"{name}: groups and bias are not supported here"
    for name, norm in norms.items():
        if reason := bypass_obstacle(norm, nn.BatchNorm2d):
            return f"{name}: {reason}"
    if _differ([(*_geometry(conv), conv.weight.shape[2:]) for conv in convs.values()]):
        return "the convolutions differ in kernel size, stride, padding or dilation"
    if len(norms) == 2:
        r, t = norms.values()
        if r is t:
            return "both streams share one norm, which then updates its statistics twice"
        if _differ([(n.training, n.eps, n.momentum, n.track_running_stats, *map(_kind, _tensors(n))) for n in (r, t)]):
            return "the norms differ in mode, eps, momentum, tracking, affine parameters or dtype"
    return ""


def misfit(layer: Layer, inputs: tuple[int, int], outputs: tuple[int, int]) -> str:
    """Why modules without an obstacle do not fit streams of so many channels (r, t)."""
    shapes = [(c_out, c_in) for c_in in inputs for c_out in outputs]
    for (name, conv), shape in zip(layer.convs.items(), shapes, strict=True):
        if (conv is None) != (0 in shape) or (conv is not None and conv.weight.shape[:2] != shape):
            return f"{name}: its channels do not fit the streams"
    for (name, norm), channels in zip(layer.norms.items(), outputs, strict=True):
        if (norm is None) != (channels == 0):
            return f"{name}: its channels do not fit the streams"
        if norm is not None and any(t is not None and t.shape != (channels,) for t in _tensors(norm)):
            return f"{name}: its channels do not fit the streams"
    return ""


def keeps_size(layer: Layer, stride: int) -> bool:
    """Whether the convolutions map an image to its every stride-th pixel, so that the input can be added."""
    conv = _first(layer.convs)
    (stride_h, stride_w), padding, dilation = _geometry(conv)
    same = [2 * p == d * (k - 1) for p, d, k in zip(padding, dilation, conv.weight.shape[2:], strict=True)]
    return all(same) and stride_h == stride_w == stride


def counts_agree(layer: Layer) -> bool:
    """Whether one momentum serves both norms; reads the counters, but only for the cumulative average."""
    norms = [norm for norm in layer.norms.values() if norm is not None]
    if len(norms) == 1 or norms[0].momentum is not None or not norms[0].training or not norms[0].track_running_stats:
        return True
    r, t = (norm.num_batches_tracked for norm in norms)
    return r is t or (r is not None and t is not None and int(r) == int(t))


def run(layer: Layer, x, *, residuals=(), shortcut_channels=0, branch_scale=1.0, impl):
    """x = [r | t] -> [r' | t'], for a layer without obstacles that fits."""
    stride, padding, dilation = _geometry(_first(layer.convs))
    norms = [norm for norm in layer.norms.values() if norm is not None]
    norm = norms[0] if len(norms) == 1 else _JoinedNorm(*norms)
    spec = ConvBNActSpec(
        stride=stride,
        padding=padding,
        dilation=dilation,
        shortcut_channels=shortcut_channels,
        branch_scale=branch_scale,
        eps=norm.eps,
    )
    weight = pack_weight(*(None if conv is None else conv.weight for conv in layer.convs.values()))
    y = norm_state.conv_bn_act(norm, x, weight, spec=spec, residuals=residuals, impl=impl)
    if len(norms) == 2:
        norm.write_back()
    return y


class _JoinedNorm:
    """Two norms that agree, side by side: what norm_state reads of a BatchNorm2d."""

    def __init__(self, r: nn.BatchNorm2d, t: nn.BatchNorm2d):
        self.norms = r, t
        self.training, self.eps, self.momentum = r.training, r.eps, r.momentum
        self.track_running_stats = r.track_running_stats
        self.weight, self.bias, self.running_mean, self.running_var = (
            None if of_r is None else torch.cat([of_r, of_t])
            for of_r, of_t in zip(_tensors(r), _tensors(t), strict=True)
        )
        self.num_batches_tracked = r.num_batches_tracked  # itself, so r's batch is counted by norm_state

    def write_back(self):
        """Give the norms their parts of the updated statistics, and count the batch for t."""
        r, t = self.norms
        if not (self.training and self.track_running_stats):
            return
        if self.running_mean is not None:
            split = r.running_mean.shape[0]
            for name in ("running_mean", "running_var"):
                joined = getattr(self, name)
                getattr(r, name).copy_(joined[:split])
                getattr(t, name).copy_(joined[split:])
        if t.num_batches_tracked is not None:
            t.num_batches_tracked.add_(1)


def _tensors(norm):
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def _kind(tensor):
    return None if tensor is None else (tensor.dtype, tensor.device)


def _geometry(conv):
    return pair(conv.stride), padding_of(conv), pair(conv.dilation)


def _first(convs):
    return next(conv for conv in convs.values() if conv is not None)


def _differ(values):
    return any(value != values[0] for value in values)
