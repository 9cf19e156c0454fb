"""Tiles that were measured on a GPU, on top of the analytic rule: `tiles/<device>.json`, written by `bench tune`.

Only tiles that fit the GPU are taken, and a tile serves the very problem that it was measured on.
"""

import functools
from pathlib import Path

from rir_kernels.device_files import read_entries, slug
from rir_kernels.triton.cost import Gpu, Problem, accumulators, stage_bytes
from rir_kernels.triton.tile import ConvConfig

SCHEMA = 1
FOLDER = Path(__file__).with_name("tiles")


def measured_tile(problem: Problem, gpu: Gpu) -> ConvConfig | None:
    """The fastest tile that was found for this problem on this GPU, None where nobody looked."""
    return _load(FOLDER / f"{slug(gpu.name)}.json", gpu).get(problem) if gpu.name else None


@functools.cache
def _load(path, gpu):
    return read_entries(
        path, SCHEMA, "tiles", lambda entry: _entry(entry, gpu),
        instead="tiles are chosen by rule", command="bench tune",
    )  # fmt: skip


def _entry(entry, gpu):
    """(problem, tile); ValueError for what no launcher should be handed."""
    problem = Problem(**{name: tuple(v) if isinstance(v, list) else v for name, v in entry["problem"].items()})
    tile = ConvConfig(**{**entry["tile"], "box": tuple(entry["tile"]["box"])})
    sizes = (*tile.box, tile.block_c, tile.block_k, tile.num_warps)
    if not all(isinstance(size, int) and 1 <= size <= 256 and size & (size - 1) == 0 for size in sizes):
        raise ValueError(f"expected powers of two up to 256, got {tile}")
    if len(tile.box) != 3 or tile.block_c * (4 if tile.fold else 1) < 64 or tile.num_warps not in (4, 8):
        raise ValueError(f"not a tile: {tile}")
    if not all(isinstance(number, int) and 1 <= number <= 8 for number in (tile.num_stages, tile.groups, tile.rows)):
        raise ValueError(f"expected 1 to 8 stages, groups and rows, got {tile}")
    if tile.rows > 1 and (tile.box[1] > 1 or not problem.shares_rows):
        raise ValueError(f"rows are shared by boxes of one row, at stride 1: {tile}")
    if tile.skips is not False and (tile.skips is not True or tile.box[1:] != (1, 1) or not problem.has_border):
        raise ValueError(f"padding is skipped by boxes of one pixel, by a 3x3 at stride 1: {tile}")
    folds = problem.folds and min(tile.box[1:]) > 1 and tile.groups == tile.rows == 1 and not tile.skips
    if tile.fold is not False and (tile.fold is not True or not folds):
        raise ValueError(f"blocks of 2x2 pixels are of a 3x3 at stride 1, in even boxes, and of nothing else: {tile}")
    if tile.num_stages * stage_bytes(tile, problem) > gpu.shared_bytes or accumulators(tile) > 255:
        raise ValueError(f"too large for {gpu}: {tile}")
    return problem, tile
