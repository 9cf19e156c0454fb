"""How fast the copy engine (TMA) reads boxes of a tensor that lies in the L2 cache."""

import statistics

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.measure import timing

BOX = 128, 64  # rows, and channels of 16 bits


@triton.jit
def _read_fwd_kernel(rows, out_ptr, boxes, STEPS: tl.constexpr, BOX_M: tl.constexpr, BOX_C: tl.constexpr):
    """Each program reads STEPS boxes, and keeps the largest value of each row so that none is read in vain."""
    first = tl.program_id(0) * STEPS
    largest = tl.full([BOX_M], float("-inf"), tl.float32)
    for step in range(STEPS):
        box = rows.load([(first + step) % boxes * BOX_M, 0])  # [BOX_M, BOX_C]
        largest = tl.maximum(largest, tl.max(box.to(tl.float32), 1))
    tl.store(out_ptr + tl.program_id(0) * BOX_M + tl.arange(0, BOX_M), largest)


def l2_read_gbps(device: torch.device, *, mib: float = 16, steps: int = 256, settings: timing.Settings) -> float:
    """GB/s of 16-KiB boxes read over and over from `mib` MiB, by two programs a multiprocessor."""
    boxes = max(1, int(mib * 2**20) // (2 * BOX[0] * BOX[1]))
    source = torch.randn(boxes * BOX[0], BOX[1], device=device).to(torch.float16)
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs, BOX[0], device=device)
    rows = TensorDescriptor(source, list(source.shape), list(source.stride()), list(BOX))

    def call():
        _read_fwd_kernel[(programs,)](rows, out, boxes, steps, *BOX, num_warps=4, num_stages=4)

    call()
    timing.synchronize(device)
    expected = source.float().amax(1).view(boxes, BOX[0])
    # the programs' boxes follow each other, and each reads `steps` of them
    read = (torch.arange(programs)[:, None] * steps + torch.arange(steps)) % boxes
    if not torch.equal(out, expected[read.to(expected.device)].amax(1)):
        raise RuntimeError("the boxes were not all read: the rate would mean nothing")
    timed = timing.measure_steady({"": call}, device, settings)[""]
    if timed.error:
        raise RuntimeError(timed.error)
    return 2 * BOX[0] * BOX[1] * steps * programs / statistics.median(timed.samples) / 1e6
