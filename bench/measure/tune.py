"""Which tiles are fastest, of convolution and weight gradient: writes what `rir_kernels.triton.tiling.measured` reads.

The analytic rule's best candidates take turns, in every use of the kernel that the shape has; each first passes the
gate. All times are kept with the rule's predictions, so that its constants can be corrected.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from bench.cases import kernels
from bench.measure import timing
from bench.schema import DTYPES, ResultsError, read_json
from rir_kernels.common.device_tables import slug
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.launch.runtime import gpu_of
from rir_kernels.triton.launch.wgrad import weight_grad_problem
from rir_kernels.triton.shapes import Shape
from rir_kernels.triton.tiling.conv_cost import Problem
from rir_kernels.triton.tiling.conv_tiles import ranked_tiles, use_tile
from rir_kernels.triton.tiling.measured import SCHEMA
from rir_kernels.triton.tiling.wgrad_tiles import ranked_wgrad_tiles, use_wgrad_tile
from tooling import console, provenance
from tooling.files import jsonable, save_json


@dataclass(frozen=True)
class Kernel:
    """What is tuned: its problem in a layer of some shape, the tiles that it may take, and where it is used."""

    name: str
    field: str  # of the file
    problem: Callable  # (shape, dtype, device)
    ranked: Callable  # (problem, gpu) -> [(clocks, tile)]
    use: Callable  # tile -> context
    kind: Callable  # tile -> what sets it apart
    ops: Callable  # shape -> ops of the kernels suite that are this problem


def _conv_problem(shape, dtype, _device):
    size = -(-shape.size // shape.stride)
    return Problem(
        shape.batch, size, size, shape.c_out, shape.c_in, (shape.kernel,) * 2, dtype.itemsize,
        padding=(shape.kernel // 2,) * 2 if shape.stride == 1 else None,
    )  # fmt: skip


def _conv_kind(tile):
    return tile.rows, tile.skips, tile.fold, tile.groups, tile.block_c, tile.num_warps, prod(tile.box)


def _conv_ops(shape):
    """The data gradient is the same problem where nothing changes shape."""
    return ("conv_eval", "conv_train", *(("data_grad",) if (shape.c_in, shape.stride) == (shape.c_out, 1) else ()))


def _wgrad_problem(shape, dtype, device):
    spec = ConvBNActSpec((shape.stride,) * 2, (shape.kernel // 2,) * 2)
    size = -(-shape.size // shape.stride)
    element = torch.empty((1, 1, 1, 1), dtype=dtype, device=device)
    x = element.expand(shape.batch, shape.c_in, shape.size, shape.size)
    dz = element.expand(shape.batch, shape.c_out, size, size)
    return weight_grad_problem(dz, x, (shape.kernel,) * 2, spec)


def _wgrad_kind(tile):
    """Of tiles that differ in what padding they leave out the rule's constants tell the better one."""
    return tile.walk, tile.rows, tile.pack, tile.block_co, tile.block_ci, tile.num_warps, prod(tile.box)


CONVOLUTION = Kernel("convolution", "tiles", _conv_problem, ranked_tiles, use_tile, _conv_kind, _conv_ops)
WEIGHT_GRADIENT = Kernel(
    "weight gradient", "wgrad_tiles", _wgrad_problem, ranked_wgrad_tiles, use_wgrad_tile, _wgrad_kind,
    lambda _shape: ("weight_grad",),
)  # fmt: skip
KERNELS = (CONVOLUTION, WEIGHT_GRADIENT)


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
    """Measures, and leaves `folder`/<device>.json behind, written anew after every shape.

    What an earlier run with the same code and versions left there stays, and is not measured again.
    """
    started = time.monotonic()
    gpu = gpu_of(torch.empty(0, device=device))
    name = gpu.name or provenance.describe(device)["name"]
    path = Path(folder) / f"{slug(name)}.json"
    found = {
        "schema": SCHEMA,
        "device": name,
        "versions": provenance.versions(),
        "sources_hash": provenance.sources_hash("kernels"),  # without tiles that were measured before
        **{kernel.field: [] for kernel in KERNELS},
    }
    with contextlib.suppress(ResultsError):
        earlier = read_json(path)
        if all(earlier.get(name) == found[name] for name in ("schema", "device", "versions", "sources_hash")):
            found = earlier
    jobs = [(kernel, shape, dtype) for dtype in dtypes for shape in shapes for kernel in KERNELS]
    with console.progress("tune", len(jobs)) as reach:
        for index, (kernel, shape, dtype) in enumerate(jobs):
            found["unreached"] = [f"{shape.name} {dtype}, {kernel.name}" for kernel, shape, dtype in jobs[index:]]
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                console.say(f"no time left for {found['unreached'][0]}, and what follows")
                break
            reach(index, found["unreached"][0])
            problem = jsonable(dataclasses.asdict(kernel.problem(shape, getattr(torch, DTYPES[dtype]), device)))
            known = any(jsonable(entry["problem"]) == problem for entry in found[kernel.field])
            if not known and (entry := _tune(kernel, shape, dtype, device, gpu, candidates, settings)):
                found[kernel.field].append(entry)
            found["unreached"] = found["unreached"][1:]
            save_json(path, found)
    return path


def _tune(kernel, shape, dtype, device, gpu, candidates, settings):
    """The kernel's entry of one shape; None where no candidate works."""
    torch_dtype = getattr(torch, DTYPES[dtype])
    problem = kernel.problem(shape, torch_dtype, device)
    ranked = different(kernel, problem, gpu)[:candidates]
    milliseconds = {index: 0.0 for index in range(len(ranked))}
    for op in kernel.ops(shape):
        call, check = _calls(op, shape, torch_dtype, device)
        calls = {}
        for index in list(milliseconds):
            tile = ranked[index][1]
            try:
                with kernel.use(tile):
                    verdict = check()
            except Exception as error:  # it may need more than the GPU has
                timing.check_device(device, error)
                verdict = None
            if verdict is None or not verdict.passed:
                del milliseconds[index]
                continue
            calls[index] = _within(kernel.use, tile, call)
        for index, timed in timing.measure_steady(calls, device, settings).items():
            if timed.error:
                del milliseconds[index]
            else:
                milliseconds[index] += statistics.median(timed.samples)
    name = f"{shape.name} x{shape.batch} {dtype}, {kernel.name}"
    if not milliseconds:
        console.say(f"{name}: none of {len(ranked)} tiles works")
        return None
    best = min(milliseconds, key=milliseconds.get)
    by_rule = milliseconds.get(0)
    gain = f", {by_rule / milliseconds[best]:.2f} times as fast as the rule's" if by_rule else ""
    console.say(f"{name}: {milliseconds[best]:.4g} ms{gain}: {ranked[best][1]}")
    return {
        "problem": dataclasses.asdict(problem),
        "tile": ranked[best][1]._asdict(),
        "ms": milliseconds[best],
        "measured": [
            {"tile": tile._asdict(), "clocks": clocks, "ms": milliseconds.get(index)}
            for index, (clocks, tile) in enumerate(ranked)
        ],
    }


def different(kernel: Kernel, problem, gpu) -> list:
    """The best of every kind: the rule's constants may be wrong, and its first dozen tiles are much alike."""
    best = {}
    for clocks, tile in kernel.ranked(problem, gpu):
        best.setdefault(kernel.kind(tile), (clocks, tile))
    return list(best.values())


def _calls(op, shape, dtype, device):
    variant = kernels.set_up(op, shape, dtype, device)("triton", True)
    (call,) = variant.calls.values()
    return call, variant.check


def _within(use, tile, call):
    def forced():
        with use(tile):
            call()

    return forced
