"""Weights of pytorchcv's rir_cifar10, rir_cifar100 and rir_svhn (pytorchcv.models.rir_cifar), both ways, bit for bit.

Their network is ResNet Init with projections: create("resnet_init18_wide", shortcut="projection"). They keep the
streams apart, so that most of our tensors are several of theirs, rows (outputs) r', t' and columns (inputs) r, t:

    layers.J.weight         [[res_pass_conv,  trans_cross_conv],     of features.stageS.unitU
                             [res_cross_conv, trans_pass_conv]]
    layers.J.bn.*           [[res_postactiv.bn.*], [trans_postactiv.bn.*]]
    layers.J.projection     [[identity_conv]]
    stem.conv.weight        [[features.init_block.res_conv.conv], [features.init_block.trans_conv.conv]], bn.* likewise
    head.conv.weight, bn.*  [[output.final_conv.conv]], [[output.final_conv.bn.*]]
"""

import re
from collections.abc import Mapping

import torch

from .rir import RiR

_PER_BLOCK = 2  # layers of a block: theirs has no blocks, and ours no outer shortcut, so it only decides names


def from_pytorchcv(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict from theirs: for create("resnet_init18_wide", num_classes, shortcut="projection").

    Widths, depths and classes are read from the tensors (for others than the wide network's:
    RiR(width=..., depth=..., outer_shortcut=False, shortcut="projection")). The result shares no memory with what came,
    which is left alone. ValueError for keys that are missing or too many, for shapes that are none of such a network's,
    and for streams that differ in dtype or in their number of batches, which one norm cannot keep.
    """
    _check_mapping(state_dict)
    units = _counts(state_dict, r"features\.stage(\d+)\.unit(\d+)\.", first=1)
    odd = [count for count in units if count % _PER_BLOCK]
    if odd:
        raise ValueError(f"every stage must have an even number of units, got {units}: a block of ours takes two")
    unit = "features.stage{}.unit1.res_pass_conv.weight".format
    width = [2 * _size(state_dict, unit(stage), 0) for stage in range(1, len(units) + 1)]
    keys, shapes = _layout(
        num_classes=_size(state_dict, "output.final_conv.conv.weight", 0),
        in_channels=_size(state_dict, "features.init_block.res_conv.conv.weight", 1),
        width=width,
        depth=[count // _PER_BLOCK for count in units],
        layers_per_block=_PER_BLOCK,
    )
    theirs = {name: _part(shapes[ours], grid) for ours, grid in keys.items() for row in grid for name in row}
    _check(state_dict, theirs)
    return {ours: _join(ours, [[state_dict[name] for name in row] for row in grid]) for ours, grid in keys.items()}


def to_pytorchcv(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their state dict from ours: the reverse of from_pytorchcv, with the same errors.

    state_dict is that of a network of rir_kernels' layers (packed); its blocks may have any number of layers.
    """
    _check_mapping(state_dict)
    depth = _counts(state_dict, r"stages\.(\d+)\.(\d+)\.", first=0)
    width = [_size(state_dict, f"stages.{stage}.0.layers.0.weight", 0) for stage in range(len(depth))]
    keys, shapes = _layout(
        num_classes=_size(state_dict, "head.conv.weight", 0),
        in_channels=_size(state_dict, "stem.conv.weight", 1),
        width=width,
        depth=depth,
        layers_per_block=_counts(state_dict, r"stages\.(0)\.0\.layers\.(\d+)\.", first=0)[0],
    )
    if any(channels % 2 for channels in width):
        raise ValueError(f"pytorchcv's streams are equally wide, got stages of {width} channels: they must be even")
    _check(state_dict, shapes)
    return {name: part for ours, grid in keys.items() for name, part in _split(state_dict[ours], grid)}


def _layout(*, layers_per_block, **options):
    """For every key of ours the grid of theirs that it consists of, and its shape."""
    options |= {"layers_per_block": layers_per_block, "outer_shortcut": False, "shortcut": "projection"}
    model = RiR(**options, device="meta")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {name: _grid(name, layers_per_block) for name in shapes}, shapes


def _grid(name, layers_per_block):
    part, _, rest = name.partition(".")
    if part == "stem":
        return [[f"features.init_block.{stream}_conv.{rest}"] for stream in ("res", "trans")]
    if part == "head":
        return [[f"output.final_conv.{rest}"]]
    stage, block, _, layer, rest = rest.split(".", 4)
    unit = f"features.stage{int(stage) + 1}.unit{int(block) * layers_per_block + int(layer) + 1}"
    if rest == "weight":
        rows = (("res_pass", "trans_cross"), ("res_cross", "trans_pass"))
        return [[f"{unit}.{conv}_conv.weight" for conv in row] for row in rows]
    if rest == "projection.weight":
        return [[f"{unit}.identity_conv.weight"]]
    return [[f"{unit}.{stream}_postactiv.{rest}"] for stream in ("res", "trans")]


def _part(shape, grid):
    """The shape of each of theirs in a tensor of ours."""
    divisors = (len(grid), len(grid[0]))
    return torch.Size([*(size // by for size, by in zip(shape, divisors, strict=False)), *shape[2:]])


@torch.no_grad()
def _join(name, rows):
    parts = [part for row in rows for part in row]
    if any(part.dtype != parts[0].dtype for part in parts):
        raise ValueError(f"{name} is one tensor here, but came as {[part.dtype for part in parts]}: cast the parts")
    if parts[0].dim() == 0:  # num_batches_tracked
        if any(not torch.equal(part, parts[0]) for part in parts):
            raise ValueError(f"{name} is one number here, but the streams have {[part.item() for part in parts]}")
        return parts[0].clone()
    return torch.cat([torch.cat(row, dim=1) if len(row) > 1 else row[0] for row in rows])


def _split(tensor, grid):
    tensor = tensor.detach()
    rows = tensor.chunk(len(grid)) if tensor.dim() else [tensor] * len(grid)  # num_batches_tracked: both have it
    for names, row in zip(grid, rows, strict=True):
        parts = row.chunk(len(names), dim=1) if len(names) > 1 else [row]
        for name, part in zip(names, parts, strict=True):
            yield name, part.clone(memory_format=torch.contiguous_format)


def _check_mapping(state_dict):
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"expected a state dict, got {type(state_dict).__name__}: pass model.state_dict()")
    others = [name for name, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise TypeError(f"a state dict holds tensors, got something else for {_some(others)}: pass model.state_dict()")


def _counts(state_dict, pattern, *, first):
    """Members per group where keys begin with a group's and a member's number, both from `first` on without gaps."""
    matches = [match for match in (re.match(pattern, key) for key in state_dict) if match]
    found = sorted({tuple(map(int, match.groups())) for match in matches})
    groups = len({group for group, _ in found})
    counts = [sum(group == first + i for group, _ in found) for i in range(groups)]
    if not found or found != [(first + i, first + j) for i, count in enumerate(counts) for j in range(count)]:
        raise ValueError(
            f"the keys must be numbered from {first} on without gaps and match {pattern!r}; "
            f"got {found or _some(state_dict)}"
        )
    return counts


def _size(state_dict, name, dim):
    if name not in state_dict or state_dict[name].dim() != 4:
        came = f"shape {tuple(state_dict[name].shape)}" if name in state_dict else "none"
        raise ValueError(f"the state dict needs a convolution's weight {name!r}, got {came}")
    return state_dict[name].shape[dim]


def _check(state_dict, shapes):
    """ValueError unless the keys and shapes are those."""
    missing = [name for name in shapes if name not in state_dict]
    unexpected = [name for name in state_dict if name not in shapes]
    if missing or unexpected:
        raise ValueError(f"not the keys of such a network: missing {_some(missing)}, unexpected {_some(unexpected)}")
    for name, shape in shapes.items():
        if state_dict[name].shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(state_dict[name].shape)}")


def _some(names, limit=4):
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "none"
