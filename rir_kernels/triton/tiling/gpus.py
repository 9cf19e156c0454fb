"""What the choice of a tile depends on of a GPU: what the driver says, and what its architecture can do.

An architecture's figures are data sheets' (dense bf16 with fp32 sums, memory, both a multiprocessor and clock at boost)
relative to an H200's; nothing but an H200 is meant to have been measured. L2 is on no data sheet: taken as the H200's.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from rir_kernels.common.versions import triton_release


@dataclass(frozen=True)
class Limits:
    """The tiles that compile well: what `python -m rir_kernels.triton.inspect --arch` passes."""

    sums: int  # of a thread, in every epilogue without spills
    sums_of_rows: int  # where rows share their input, or padding is skipped
    sums_folded: int  # of blocks of 2x2 pixels
    pixels: int  # of one product
    block_k: int  # channels of a step
    sums_beside_upstream: int  # beside the z of the layer upstream, in 16 bits
    wgrad_sums: int
    wgrad_warps: int = 8
    wgrad_rows: int = 7  # whose products in a step add to the same sums
    rows: int = 4  # likewise
    groups: bool = True
    skips: bool = True


LIMITS = {
    "wgmma": Limits(192, 128, 64, 256, 64, 192, 192),
    # operands and addresses are in registers too
    "mma": Limits(32, 32, 0, 64, 32, 32, 48, wgrad_rows=2, rows=1, groups=False, skips=False),
    # sums are in tensor memory, but for the epilogue. Of two products in a step that add to the same sums Triton 3.6
    # and 3.7 make a kernel that does nothing but trap
    "tcgen05": Limits(128, 128, 0, 128, 64, 64, 96, wgrad_warps=4, wgrad_rows=1, rows=1, skips=False),
}
# what differs from one release of Triton on, until the next one that is named here
LIMITS_SINCE: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {
    "wgmma": {
        # reads all of that z into registers before it uses any
        (3, 8): {"sums_beside_upstream": 128},
        (3, 9): {},
    },
}


@dataclass(frozen=True)
class Architecture:
    product: str  # the instruction that Triton makes of tl.dot
    sms: int  # of one such GPU, where none is there to be asked; and its shared memory of a program
    shared_kb: int
    tensor: float = 1.0
    memory: float = 1.0


ARCHITECTURES = {
    80: Architecture("mma", 108, 163, tensor=0.5, memory=0.67),  # A100: 312 TFLOP/s, 2.0 TB/s
    86: Architecture("mma", 84, 99, tensor=0.25, memory=0.24),  # A40: 150 TFLOP/s, 0.70 TB/s
    89: Architecture("mma", 142, 99, tensor=0.25, memory=0.12),  # L40S: 362 TFLOP/s, 0.86 TB/s; L4: the same a SM
    90: Architecture("wgmma", 132, 227),
    100: Architecture("tcgen05", 148, 227, tensor=2.0, memory=1.46),  # B200: 2250 TFLOP/s, 8.0 TB/s
    120: Architecture("mma", 170, 99, tensor=0.125, memory=0.22),  # RTX 5090: 210 TFLOP/s, 1.8 TB/s
}


@dataclass(frozen=True)
class Gpu:
    """The default is an H200, where no GPU is asked."""

    sms: int = 132
    shared_bytes: int = 227 * 1024  # of a program
    name: str = ""  # where there is one, tiles that were measured on it come first
    arch: int = 90  # ten times the compute capability

    @property
    def architecture(self) -> Architecture:
        """The latest known one that is not later than the GPU's, of its own kind of tensor cores."""
        return ARCHITECTURES[max(known for known in ARCHITECTURES if known <= max(self.arch, 80))]

    @property
    def limits(self) -> Limits:
        """Of the Triton that is installed, the same in every process of a job; of 3.6 where there is none."""
        return limits_of(self.architecture.product, triton_release() or (3, 6))

    @property
    def has_descriptors(self) -> bool:
        """Whether a copy engine reads and writes boxes of tensors (TMA): since Hopper."""
        return self.arch >= 90


@functools.cache
def limits_of(product: str, release: tuple[int, ...]) -> Limits:
    """The limits for that instruction under that Triton, (3, 9) for instance."""
    since = LIMITS_SINCE.get(product, {})
    known = [changes for first, changes in sorted(since.items()) if first <= release]
    return dataclasses.replace(LIMITS[product], **known[-1]) if known else LIMITS[product]


H200 = Gpu()


def typical_gpu(arch: int) -> Gpu:
    """A GPU of that architecture, where none is there to be asked."""
    architecture = Gpu(arch=arch).architecture
    return Gpu(architecture.sms, architecture.shared_kb * 1024, arch=arch)
