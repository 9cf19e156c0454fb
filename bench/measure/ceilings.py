"""What the device can do at most, measured in the run whose figures are held against it."""

import statistics

import torch

from bench.measure.timing import Settings, measure_steady
from bench.schema import DTYPES

# (elements copied in main memory, within the L2 cache; side of the matrices), by device type
SIZES = {"cuda": (2**29, 2**22, 8192), "cpu": (2**24, None, 512)}


def measure_ceilings(device: torch.device, dtypes, settings: Settings) -> dict:
    """`copy_gbps` and `l2_gbps` (bytes read and written), `matmul_tflops` by dtype, under torch's switches as they are.

    `l2_gbps` of a GPU alone. Random data: its clocks depend on them.
    """
    large, small, side = SIZES[device.type]
    ceilings = {"copy_gbps": _copy_gbps(large, device, settings)}
    if small:
        ceilings["l2_gbps"] = _copy_gbps(small, device, settings)
    ceilings["matmul_tflops"] = {name: _matmul_tflops(side, DTYPES[name], device, settings) for name in dtypes}
    return ceilings


def _copy_gbps(elements, device, settings):
    source = torch.randn(elements, device=device).to(torch.float16)
    target = torch.empty_like(source)
    return 4 * elements / _milliseconds(lambda: target.copy_(source), device, settings) / 1e6


def _matmul_tflops(side, dtype, device, settings):
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _milliseconds(lambda: torch.mm(a, b, out=out), device, settings) / 1e9


def _milliseconds(call, device, settings):
    call()
    timing = measure_steady({"": call}, device, settings)[""]
    if timing.error:
        raise RuntimeError(f"the ceilings could not be measured: {timing.error}")
    return statistics.median(timing.samples)
