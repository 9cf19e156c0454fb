"""GPU properties used for tile selection: what the driver reports, and what the architecture can do.

An architecture's figures come from data sheets (dense bf16 with fp32 accumulation, memory; both per SM and boost
clock), relative to an H200's; only an H200's may be measured. Data sheets don't give L2: it is taken as the H200's.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from rir_kernels.common.versions import triton_release


@dataclass(frozen=True)
class Limits:
    """Limits of the tiles that compile well, that is, pass `python -m rir_kernels.triton.inspect --arch`."""

    sums: int  # accumulators per thread that don't spill in any epilogue
    sums_of_rows: int  # the same if rows share their input, or padding is skipped
    sums_folded: int  # the same for blocks of 2x2 pixels
    pixels: int  # per product
    block_k: int  # channels per step
    sums_beside_upstream: int  # accumulators that fit next to the z of the layer upstream, in 16 bits
    wgrad_sums: int
    wgrad_warps: int = 8
    wgrad_rows: int = 7  # rows whose products in a step add to the same accumulators
    rows: int = 4  # the same in the convolution
    groups: bool = True
    skips: bool = True


LIMITS = {
    "wgmma": Limits(192, 128, 64, 256, 64, 192, 192),
    # operands and addresses also take registers
    "mma": Limits(32, 32, 0, 64, 32, 32, 48, wgrad_rows=2, rows=1, groups=False, skips=False),
    # accumulators are in tensor memory, except in the epilogue. If two products in a step add to the same
    # accumulators, Triton 3.6 and 3.7 generate a kernel that only traps
    "tcgen05": Limits(128, 128, 0, 128, 64, 64, 96, wgrad_warps=4, wgrad_rows=1, rows=1, skips=False),
}
# differences since a release of Triton, valid until the next release listed here
LIMITS_SINCE: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {
    "wgmma": {
        # reads all of the upstream z into registers before it uses any of it
        (3, 8): {"sums_beside_upstream": 128},
        (3, 9): {},
    },
}


@dataclass(frozen=True)
class Architecture:
    product: str  # the instruction that Triton generates for tl.dot
    sms: int  # of a typical GPU, if none is present; also its shared memory per program
    shared_kb: int
    tensor: float = 1.0
    memory: float = 1.0


ARCHITECTURES = {
    80: Architecture("mma", 108, 163, tensor=0.5, memory=0.67),  # A100: 312 TFLOP/s, 2.0 TB/s
    86: Architecture("mma", 84, 99, tensor=0.25, memory=0.24),  # A40: 150 TFLOP/s, 0.70 TB/s
    89: Architecture("mma", 142, 99, tensor=0.25, memory=0.12),  # L40S: 362 TFLOP/s, 0.86 TB/s; L4: the same per SM
    90: Architecture("wgmma", 132, 227),
    100: Architecture("tcgen05", 148, 227, tensor=2.0, memory=1.46),  # B200: 2250 TFLOP/s, 8.0 TB/s
    120: Architecture("mma", 170, 99, tensor=0.125, memory=0.22),  # RTX 5090: 210 TFLOP/s, 1.8 TB/s
}


@dataclass(frozen=True)
class Gpu:
    """A GPU's properties; the default, if there is no GPU to query, is an H200."""

    sms: int = 132
    shared_bytes: int = 227 * 1024  # per program
    name: str = ""  # if not empty, tiles measured on it come first
    arch: int = 90  # ten times the compute capability

    @property
    def architecture(self) -> Architecture:
        """Returns the latest known architecture that is not later than the GPU's, with its kind of tensor cores."""
        return ARCHITECTURES[max(known for known in ARCHITECTURES if known <= max(self.arch, 80))]

    @property
    def limits(self) -> Limits:
        """Returns the limits under the installed Triton, the same in every process of a job; 3.6 if there is none."""
        return limits_of(self.architecture.product, triton_release() or (3, 6))

    @property
    def has_descriptors(self) -> bool:
        """Whether the GPU has TMA, which reads and writes boxes of tensors: since Hopper."""
        return self.arch >= 90


@functools.cache
def limits_of(product: str, release: tuple[int, ...]) -> Limits:
    """Returns the limits for that instruction under a release of Triton such as (3, 9)."""
    since = LIMITS_SINCE.get(product, {})
    known = [changes for first, changes in sorted(since.items()) if first <= release]
    return dataclasses.replace(LIMITS[product], **known[-1]) if known else LIMITS[product]


H200 = Gpu()


def typical_gpu(arch: int) -> Gpu:
    """Returns a typical GPU of that architecture, for when none is present."""
    architecture = Gpu(arch=arch).architecture
    return Gpu(architecture.sms, architecture.shared_kb * 1024, arch=arch)
