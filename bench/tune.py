"""Which tile of the convolution is fastest, measured: writes what `rir_kernels.triton.measured` reads.

The analytic rule's best candidates take turns, in every use of the kernel that the shape has; each first passes the
gate. All times are kept beside the rule's predictions, so that its constants can be mended by them.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rir_kernels.device_files import slug
from rir_kernels.triton.config import ranked_tiles, use_tile
from rir_kernels.triton.cost import Problem
from rir_kernels.triton.launch.runtime import gpu_of
from rir_kernels.triton.measured import SCHEMA
from rir_kernels.triton.shapes import Shape

from . import console, provenance, timing
from .results import DTYPES, save_json
from .suites import kernels


def tune(
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    device: torch.device,
    folder: Path,
    *,
    candidates: int,
    settings: timing.Settings,
    minutes: float | None = None,
) -> Path:
    """Measures, and leaves `folder`/<device>.json behind, written anew after every shape."""
    started = time.monotonic()
    gpu = gpu_of(torch.empty(0, device=device))
    name = gpu.name or provenance.describe(device)["name"]
    path = Path(folder) / f"{slug(name)}.json"
    found = {
        "schema": SCHEMA,
        "device": name,
        "versions": provenance.versions(),
        "sources_hash": provenance.sources_hash(),
        "tiles": [],
    }
    jobs = [(shape, dtype) for dtype in dtypes for shape in shapes]
    with console.progress("tune", len(jobs)) as advance:
        for shape, dtype in jobs:
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                console.say(f"no time left for {shape.name} {dtype} and what follows")
                break
            advance(f"{shape.name} {dtype}", step=0)
            if entry := _tune(shape, dtype, device, gpu, candidates, settings):
                found["tiles"].append(entry)
                save_json(path, found)
            advance()
    return path


def _tune(shape, dtype, device, gpu, candidates, settings):
    """The entry of one shape; None where no candidate works."""
    torch_dtype = getattr(torch, DTYPES[dtype])
    size = -(-shape.size // shape.stride)
    problem = Problem(
        shape.batch, size, size, shape.c_out, shape.c_in, (shape.kernel,) * 2, torch_dtype.itemsize,
        padding=(shape.kernel // 2,) * 2 if shape.stride == 1 else None,
    )  # fmt: skip
    ranked = _different(ranked_tiles(problem, gpu))[:candidates]
    milliseconds = {index: 0.0 for index in range(len(ranked))}
    for op in _ops(shape):
        call, check = _calls(op, shape, torch_dtype, device)
        calls = {}
        for index in list(milliseconds):
            tile = ranked[index][1]
            try:
                with use_tile(tile):
                    verdict = check()
            except Exception as error:  # it may need more than the GPU has
                timing.check_device(device, error)
                verdict = None
            if verdict is None or not verdict.passed:
                del milliseconds[index]
                continue
            calls[index] = _with_tile(call, tile)
        for index, timed in timing.measure_steady(calls, device, settings).items():
            if timed.error:
                del milliseconds[index]
            else:
                milliseconds[index] += statistics.median(timed.samples)
    if not milliseconds:
        console.say(f"{shape.name} x{shape.batch} {dtype}: none of {len(ranked)} tiles works")
        return None
    best = min(milliseconds, key=milliseconds.get)
    by_rule = milliseconds.get(0)
    gain = f", {by_rule / milliseconds[best]:.2f} times as fast as the rule's" if by_rule else ""
    console.say(f"{shape.name} x{shape.batch} {dtype}: {milliseconds[best]:.4g} ms{gain}: {ranked[best][1]}")
    return {
        "problem": dataclasses.asdict(problem),
        "tile": dataclasses.asdict(ranked[best][1]),
        "ms": milliseconds[best],
        "measured": [
            {"tile": dataclasses.asdict(tile), "clocks": clocks, "ms": milliseconds.get(index)}
            for index, (clocks, tile) in enumerate(ranked)
        ],
    }


def _different(ranked):
    """The best of every kind: the rule's constants may be wrong, and its first dozen tiles are much alike."""
    best = {}
    for clocks, tile in ranked:
        pixels = tile.box[0] * tile.box[1] * tile.box[2]
        kind = (tile.rows, tile.skips, tile.fold, tile.groups, tile.block_c, tile.num_warps, pixels)
        best.setdefault(kind, (clocks, tile))
    return list(best.values())


def _ops(shape):
    """The uses of the kernel that are this problem: the data gradient is where nothing changes shape."""
    return ("conv_eval", "conv_train", *(("data_grad",) if (shape.c_in, shape.stride) == (shape.c_out, 1) else ()))


def _calls(op, shape, dtype, device):
    variant = kernels.set_up(op, shape, dtype, device)("triton", True)
    (call,) = variant.calls.values()
    return call, variant.check


def _with_tile(call, tile):
    def forced():
        with use_tile(tile):
            call()

    return forced
