"""Exact conversion between the packed modules and the reference: weights cut and joined, nothing computed."""

import copy

import torch
from torch import nn

from .. import reference
from ..common.streams import pack_weight, unpack_weight

_LAYER_OPTIONS = ("kernel_size", "stride", "residual_fraction", "shortcut", "branch_scale")
_BLOCK_OPTIONS = ("stride", "outer_shortcut", "outer_streams")
_NORM_STATE = ("weight", "bias", "running_mean", "running_var")
_EMPTY = {"device": "meta"}  # every parameter is replaced: nothing to allocate, and no random number to draw


def layer_to_reference(layer) -> "reference.RiRLayer":
    """See RiRLayer.to_reference."""
    ref = reference.RiRLayer(layer.in_channels, layer.out_channels, **_options(layer, _LAYER_OPTIONS), **_EMPTY)
    blocks = unpack_weight(layer.weight.detach(), layer.in_residual, layer.out_residual)
    for conv, block in zip((ref.conv_rr, ref.conv_rt, ref.conv_tr, ref.conv_tt), blocks, strict=True):
        if conv is not None:
            conv.weight = nn.Parameter(block.clone(), layer.weight.requires_grad)
    ref.projection = copy.deepcopy(layer.projection)
    ref.train(layer.training)
    for name, rows in (("bn_r", slice(0, layer.out_residual)), ("bn_t", slice(layer.out_residual, None))):
        if getattr(ref, name) is not None:
            setattr(ref, name, _slice_norm(layer.bn, rows))
    return ref


def layer_from_reference(cls, ref, impl):
    """See RiRLayer.from_reference."""
    weights = [None if conv is None else conv.weight for conv in (ref.conv_rr, ref.conv_rt, ref.conv_tr, ref.conv_tt)]
    with torch.no_grad():
        packed = pack_weight(*weights)
    present = [weight for weight in weights if weight is not None]
    requires_grad = _agreed("requires_grad of the four convolutions", [weight.requires_grad for weight in present])
    layer = cls(ref.in_channels, ref.out_channels, **_options(ref, _LAYER_OPTIONS), impl=impl, **_EMPTY)
    layer.weight = nn.Parameter(packed, requires_grad)
    layer.projection = copy.deepcopy(ref.projection)
    layer.train(ref.training)
    layer.bn = merge_norms([bn for bn in (ref.bn_r, ref.bn_t) if bn is not None])
    return layer


def block_to_reference(block) -> "reference.RiRBlock":
    """See RiRBlock.to_reference."""
    return _convert_block(block, reference.RiRBlock, [layer.to_reference() for layer in block.layers])


def block_from_reference(cls, ref, layers):
    """See RiRBlock.from_reference."""
    return _convert_block(ref, cls, layers)


def _convert_block(source, cls, layers):
    options = _options(source, _BLOCK_OPTIONS) | {
        name: value for name, value in _options(layers[0], _LAYER_OPTIONS).items() if name != "stride"
    }
    block = cls(source.in_channels, source.out_channels, num_layers=len(layers), **options, **_EMPTY)
    block.train(source.training)
    block.layers = nn.ModuleList(layers)
    block.projection, block.projection_t = copy.deepcopy(source.projection), copy.deepcopy(source.projection_t)
    return block


def merge_norms(norms: list[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    """One norm over the channels of all, in order. ValueError where more than their per-channel values differ."""
    merged = copy.deepcopy(norms[0])
    if len(norms) == 1:
        return merged
    _agreed("class and process group of the norms", [(type(n), getattr(n, "process_group", None)) for n in norms])
    for name in ("eps", "momentum", "training", "track_running_stats"):
        _agreed(f"{name} of the norms", [getattr(norm, name) for norm in norms])
    counts = [norm.num_batches_tracked for norm in norms]
    _agreed("num_batches_tracked of the norms", [None if c is None or c.is_meta else int(c) for c in counts])
    for name in _NORM_STATE:
        tensors = [getattr(norm, name) for norm in norms]
        kinds = [None if t is None else (t.dtype, t.requires_grad) for t in tensors]
        if _agreed(f"{name} of the norms", kinds) is None:
            continue
        joined = torch.cat([tensor.detach() for tensor in tensors])
        setattr(merged, name, _as(tensors[0], joined))
    merged.num_features = sum(norm.num_features for norm in norms)
    return merged


def _slice_norm(norm, rows):
    part = copy.deepcopy(norm)
    for name in _NORM_STATE:
        tensor = getattr(norm, name)
        if tensor is not None:
            setattr(part, name, _as(tensor, tensor.detach()[rows].clone()))
    part.num_features = len(range(*rows.indices(norm.num_features)))
    return part


def _as(like, values):
    return nn.Parameter(values, like.requires_grad) if isinstance(like, nn.Parameter) else values


def _agreed(what, values):
    if any(value != values[0] for value in values):
        raise ValueError(f"{what} must agree to be packed into one layer, got {values}")
    return values[0]


def _options(module, names):
    return {name: getattr(module, name) for name in names}
