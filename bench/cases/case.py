"""What a suite consists of: cases, each one thing in one shape and dtype, and the variants that compete there."""

import dataclasses
from collections.abc import Callable

import torch

from bench.measure.gate import Verdict
from bench.measure.roofline import Pass


@dataclasses.dataclass(frozen=True)
class Variant:
    """One implementation, set up on the device. `check` is called first, and only what passes is timed."""

    calls: dict[str, Callable[[], object]]  # by mode
    check: Callable[[], Verdict]
    config: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    suite: str
    op: str
    shape: str
    batch: int
    dtype: str
    modes: dict[bool, tuple[str, ...]]  # by training
    impls: tuple[str, ...]  # those that there are for this op
    passes: dict[str, list[Pass]]  # by mode; flops and bytes of the whole, and the floor
    # (device) -> (impl, training) -> Variant; what the variants share is set up once
    set_up: Callable[[torch.device], Callable[[str, bool], Variant]]

    def __str__(self) -> str:
        return f"{self.op} {self.shape} x{self.batch} {self.dtype}"


def random_input(batch, channels, size, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> torch.Tensor:
    """Normal values in channels_last, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, size, size, generator=generator).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last)
