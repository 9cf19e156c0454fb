"""A generalized residual layer written as four convolutions and two norms: packed at each call and run as one.

Weights and affine parameters are joined by differentiable copies, so every parameter gets its own gradient. The
running statistics are joined into temporaries, which are copied back after the operation has succeeded.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from ...common.cuda_graphs import check_host_may_read
from ...common.spec import kept_spec
from ...common.streams import pack_weight
from ...dispatch import bn_state
from ...sync_batchnorm import SyncBatchNorm2d
from ..bypass import bypass_obstacle
from ..classes import BatchNorm2d, Conv2d
from ..fallback import NORMS_DIFFER


class Layer(NamedTuple):
    """The modules by their names in the unit, None if a stream is absent, and the properties required of them.

    Convolutions have no bias, and padding kernel_size // 2, so that the identity has their output's size.
    """

    convs: dict[str, nn.Conv2d | None]  # rr, rt, tr, tt
    norms: dict[str, nn.BatchNorm2d | None]  # r, t
    inputs: tuple[int, int]  # channels of r and t
    outputs: tuple[int, int]
    kernel_size: int
    stride: tuple[int, int]


def obstacle(layer: Layer) -> str:
    """Returns why the layer cannot run as one: a module may not be bypassed, or is not as described."""
    size = layer.kernel_size
    shapes = [(c_out, c_in, size, size) if c_in and c_out else None for c_in in layer.inputs for c_out in layer.outputs]
    for (name, conv), shape in zip(layer.convs.items(), shapes, strict=True):
        if conv is not shape and (reason := _conv_obstacle(conv, shape, layer)):  # both are None: no such stream
            return f"{name}: {reason}"
    for (name, norm), channels in zip(layer.norms.items(), layer.outputs, strict=True):
        if (norm is not None or channels) and (reason := _norm_obstacle(norm, channels)):
            return f"{name}: {reason}"
    r, t = layer.norms.values()
    if r is None or t is None:
        return ""
    if r is t:
        return "both streams share one norm, which updates its statistics twice"
    if _description(r) != _description(t):
        return f"{NORMS_DIFFER}, eps, momentum, tracking, affine parameters, dtype or process group"
    return ""


def counts_obstacle(layer: Layer) -> str:
    """Returns why one momentum cannot serve both norms. Reads the counters only if they determine the momentum."""
    return "" if _counts_agree(layer) else "the norms have counted different numbers of batches"


def _counts_agree(layer):
    r, t = layer.norms.values()
    if r is None or t is None or r.momentum is not None or not (r.training and r.track_running_stats):
        return True
    count_r, count_t = r.num_batches_tracked, t.num_batches_tracked
    if count_r is count_t:
        return True
    check_host_may_read("momentum=None")
    return count_r is not None and count_t is not None and int(count_r) == int(count_t)


def run(layer: Layer, x, *, residuals=(), shortcut_channels=0, branch_scale=1.0, impl):
    """Maps x = [r | t] to [r' | t'], for a layer without obstacles."""
    norms = [norm for norm in layer.norms.values() if norm is not None]
    norm: Any = norms[0] if len(norms) == 1 else _JoinedNorm(*norms)
    spec = kept_spec(
        stride=layer.stride,
        padding=(layer.kernel_size // 2, layer.kernel_size // 2),
        shortcut_channels=shortcut_channels,
        branch_scale=branch_scale,
        eps=norm.eps,
    )
    weight = pack_weight(*(None if conv is None else conv.weight for conv in layer.convs.values()))
    y = bn_state.conv_bn_act(norm, x, weight, spec=spec, residuals=residuals, impl=impl, torch_format=True)
    if isinstance(norm, _JoinedNorm):
        norm.write_back()
    return y


class _JoinedNorm:
    """Two norms with equal settings, concatenated; has what bn_state reads of a BatchNorm2d."""

    def __init__(self, r: nn.BatchNorm2d, t: nn.BatchNorm2d):
        self.norms = r, t
        self.training, self.eps, self.momentum = r.training, r.eps, r.momentum
        self.track_running_stats = r.track_running_stats
        self.weight, self.bias, self.running_mean, self.running_var = (
            None if of_r is None else torch.cat([of_r, of_t]) for of_r, of_t in zip(_state(r), _state(t), strict=True)
        )
        self.num_batches_tracked = r.num_batches_tracked  # not a copy: bn_state counts r's batch

    def active_group(self):
        r = self.norms[0]
        return r.active_group() if isinstance(r, SyncBatchNorm2d) else None

    def write_back(self):
        """Copies the updated statistics back to both norms, and counts t's batch."""
        r, t = self.norms
        if not (self.training and self.track_running_stats):
            return
        if r.running_mean is not None:
            split = r.running_mean.shape[0]
            for name in ("running_mean", "running_var"):
                joined = getattr(self, name)
                getattr(r, name).copy_(joined[:split])
                getattr(t, name).copy_(joined[split:])
        if t.num_batches_tracked is not None:
            t.num_batches_tracked.add_(1)


def _conv_obstacle(conv, shape, layer):
    if reason := bypass_obstacle(conv, Conv2d):
        return reason
    found = conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    expected = layer.stride, (layer.kernel_size // 2, layer.kernel_size // 2), (1, 1), 1, "zeros"
    if found != expected:
        return f"stride, padding, dilation, groups, padding_mode are {found}, expected {expected}"
    if conv.bias is not None:
        return "a bias is not supported here"
    if conv.weight is None or conv.weight.shape != shape:
        return f"weight: expected the shape {shape}"
    return ""


def _norm_obstacle(norm, channels):
    if reason := bypass_obstacle(norm, BatchNorm2d):
        return reason
    if not (isinstance(norm.eps, float | int) and isinstance(norm.momentum, float | int | None)):
        return f"eps={norm.eps!r} and momentum={norm.momentum!r}: only Python's numbers are fused"
    if any(tensor is not None and tensor.shape != (channels,) for tensor in _state(norm)):
        return f"it does not have {channels} channels"
    return ""


def _state(norm):
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def _description(norm):
    """Returns what must be equal for two norms to be joined; of a tensor its dtype, or None if it is absent."""
    dtypes = [None if tensor is None else tensor.dtype for tensor in _state(norm)]
    group = norm.__dict__.get("process_group")
    return type(norm), norm.training, norm.eps, norm.momentum, norm.track_running_stats, dtypes, group
