"""How fast is each kernel: by tiles of one row of boxes and of more, with ATen's operators in turn.

Times are of CUDA graphs with a warm L2 cache. Every kernel passes the gate of `bench kernels` first. What they are held
against is measured too: a copy, a matrix product, reading from the L2 cache, and cuDNN's plain convolutions.
"""

import statistics

import torch
import torch.nn.functional as F

from bench.cases import kernels
from bench.measure import timing
from bench.measure.ceilings import measure_ceilings
from bench.measure.l2 import l2_read_gbps
from bench.measure.tune import CONVOLUTION
from rir_kernels.triton.launch.runtime import gpu_of
from rir_kernels.triton.shapes import SHAPE_TABLE, Shape
from rir_kernels.triton.tiling.conv_tiles import use_tile

SHAPES = (Shape(96, 96, 32), Shape(192, 192, 16), Shape(64, 64, 56))
CONVOLUTIONS = ("conv_train", "conv_eval", "data_grad")
OTHERS = ("weight_grad", "normalize", "reduce", "apply")
DRY = ("conv_eval",)


def run(journal, machine, _seconds):
    torch.backends.cudnn.benchmark = True
    if machine.dry:
        journal.take(
            "L2 by TMA", lambda: {"gbps": l2_read_gbps(machine.device, mib=0.1, steps=2, settings=machine.settings)}
        )
    else:
        journal.take("ceilings", lambda: measure_ceilings(machine.device, (machine.dtype_name,), machine.settings))
        journal.take("L2 by TMA", lambda: {"gbps": l2_read_gbps(machine.device, settings=machine.settings)})
    for shape in machine.some(SHAPES):
        sized = machine.sized(shape)
        for op in DRY if machine.dry else (*CONVOLUTIONS, *OTHERS):
            journal.take(f"{shape.name} {op}", lambda op=op, sized=sized: _times(op, sized, machine))
    for shape in machine.some(SHAPE_TABLE):
        sized = machine.sized(shape)
        journal.take(f"{shape.name} cuDNN", lambda sized=sized: _vendor(sized, machine))


def _times(op, shape, machine):
    build = kernels.set_up(op, shape, machine.dtype, machine.device)
    calls, found = {}, {}
    tiles = _tiles(shape, machine) if op in CONVOLUTIONS else {"triton": None}
    for name, tile in tiles.items():
        variant = build("triton", False)
        (call,) = variant.calls.values()
        if tile is not None:
            call, check = _by(tile, call), _by(tile, variant.check)
        else:
            check = variant.check
        verdict = check()
        found[name] = {"passed": verdict.passed, "error": verdict.error, **variant.config}
        if tile is not None:
            found[name]["tile"] = tile._asdict()
        if verdict.passed:
            calls[name] = call
    (calls["aten"],) = build("merged", False).calls.values()
    for name, timed in timing.measure_steady(calls, machine.device, machine.settings).items():
        found[name] = found.get(name, {}) | _samples(timed)
    refused = [name for name, one in found.items() if one.get("error")]
    status = {"status": "failed", "error": f"{refused[0]}: {found[refused[0]]['error']}"} if refused else {}
    return {"batch": shape.batch, "times": found, **status}


def _tiles(shape, machine):
    """The rule's best tile of boxes of one row, and the best whose rows share their input, as far as there are such."""
    problem = CONVOLUTION.problem(shape, machine.dtype, machine.device)
    found = {}
    for _, tile in CONVOLUTION.ranked(problem, gpu_of(torch.empty(0, device=machine.device))):
        if not tile.skips:
            found.setdefault("rows" if tile.rows > 1 else "one row", tile)
    return found


def _by(tile, function):
    def forced():
        with use_tile(tile):
            return function()

    return forced


def _vendor(shape, machine):
    x = torch.randn(shape.batch, shape.c_in, shape.size, shape.size, device=machine.device, dtype=machine.dtype)
    weight = torch.randn(
        shape.c_out, shape.c_in, shape.kernel, shape.kernel, device=machine.device, dtype=machine.dtype
    )
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))

    def call():
        return F.conv2d(x, weight, stride=shape.stride, padding=shape.kernel // 2)

    call()
    return _samples(timing.measure_steady({"": call}, machine.device, machine.settings)[""])


def _samples(timed):
    if timed.error:
        return {"error": timed.error}
    return {"ms": statistics.median(timed.samples), "samples": timed.samples}
