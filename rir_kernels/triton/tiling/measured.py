"""Tiles measured on a GPU, which override the analytic rule: `tiles/<device>.json`, written by `bench tune`.

Only tiles that fit the GPU are taken, and a tile serves only the problem it was measured on.
"""

from pathlib import Path

from rir_kernels.common.device_tables import looked_up_once, read_entries, slug
from rir_kernels.triton.tiling import conv_cost, wgrad_cost
from rir_kernels.triton.tiling.conv_cost import Problem, stage_bytes
from rir_kernels.triton.tiling.gpus import Gpu
from rir_kernels.triton.tiling.tile import ConvConfig
from rir_kernels.triton.tiling.wgrad_cost import WgradProblem, WgradTile, can_skip, shared_bytes, walks

SCHEMA = 1
FOLDER = Path(__file__).with_name("tiles")


def measured_tile(problem: Problem, gpu: Gpu) -> ConvConfig | None:
    """Returns the convolution's fastest measured tile for this problem on this GPU, or None."""
    return _measured("tiles", _entry, problem, gpu)


def measured_wgrad_tile(problem: WgradProblem, gpu: Gpu) -> WgradTile | None:
    """Returns the weight gradient's fastest measured tile for this problem on this GPU, or None."""
    return _measured("wgrad_tiles", _wgrad_entry, problem, gpu)


def _measured(field, parse, problem, gpu):
    return _load(FOLDER / f"{slug(gpu.name)}.json", field, parse, gpu).get(problem) if gpu.name else None


@looked_up_once
def _load(path, field, parse, gpu):
    return read_entries(
        path, SCHEMA, field, lambda entry: parse(entry, gpu),
        instead="tiles are chosen by rule", command="bench tune",
    )  # fmt: skip


def _entry(entry, gpu):
    """Parses (problem, tile); raises ValueError for a tile that no launcher should get."""
    problem, tile = Problem(**_hashable(entry["problem"])), ConvConfig(**_hashable(entry["tile"]))
    _check_sizes(tile, (*tile.box, tile.block_c, tile.block_k, tile.num_warps), (tile.groups, tile.rows))
    if tile.block_c * (4 if tile.fold else 1) < 64:
        raise ValueError(f"not a tile: {tile}")
    if tile.rows > 1 and (tile.box[1] > 1 or not problem.shares_rows):
        raise ValueError(f"rows are shared by boxes of one row, at stride 1: {tile}")
    if tile.skips is not False and (tile.skips is not True or tile.box[1:] != (1, 1) or not problem.has_border):
        raise ValueError(f"padding is skipped by boxes of one pixel, by a 3x3 at stride 1: {tile}")
    folds = problem.folds and min(tile.box[1:]) > 1 and tile.groups == tile.rows == 1 and not tile.skips
    if tile.fold is not False and (tile.fold is not True or not folds):
        raise ValueError(f"blocks of 2x2 pixels are of a 3x3 at stride 1, in even boxes, and of nothing else: {tile}")
    if tile.num_stages * stage_bytes(tile, problem) > gpu.shared_bytes or conv_cost.accumulators(tile) > 255:
        raise ValueError(f"too large for {gpu}: {tile}")
    return problem, tile


def _wgrad_entry(entry, gpu):
    problem, tile = WgradProblem(**_hashable(entry["problem"])), WgradTile(**_hashable(entry["tile"]))
    blocks = tile.block_co, tile.block_ci
    _check_sizes(tile, (*tile.box, *blocks, tile.num_warps, tile.pack), (tile.rows,))
    pixels = tile.box[0] * tile.box[1] * tile.box[2]
    if min(pixels, *blocks) < 16:
        raise ValueError(f"not a tile: {tile}")
    if tile.pack > 1 and (not problem.packs or problem.w % tile.pack):
        raise ValueError(f"pixels that stand side by side are no channels there: {tile}")
    if (tile.walk, tile.box) not in walks(problem, tile.pack, pixels):
        raise ValueError(f"that walk has no such box: {tile}")
    if tile.rows > 1 and (tile.walk == "rows" or not problem.shares_rows):
        raise ValueError(f"rows are shared by boxes of one row, at stride 1: {tile}")
    skips = can_skip(problem, tile.walk, tile.pack)
    if tile.skips is not False and (tile.skips is not True or not skips):
        raise ValueError(f"padding is skipped by boxes of one pixel, by a 3x3 at stride 1: {tile}")
    if shared_bytes(problem, tile) > gpu.shared_bytes or wgrad_cost.accumulators(problem, tile) > 255:
        raise ValueError(f"too large for {gpu}: {tile}")
    return problem, tile


def _hashable(fields):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _check_sizes(tile, sizes, counts):
    """Checks what all tiles have in common: `sizes` are powers of two, `counts` small, as their loops are unrolled."""
    if not all(isinstance(size, int) and 1 <= size <= 256 and size & (size - 1) == 0 for size in sizes):
        raise ValueError(f"expected powers of two up to 256, got {tile}")
    if len(tile.box) != 3 or tile.num_warps not in (4, 8):
        raise ValueError(f"not a tile: {tile}")
    if not all(isinstance(count, int) and 1 <= count <= 8 for count in (tile.num_stages, *counts)):
        raise ValueError(f"expected 1 to 8 stages, groups and rows, got {tile}")
