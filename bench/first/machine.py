"""What the steps run on: the GPU with the sizes that the project speaks of, or a stand-in with small ones."""

import contextlib
import dataclasses
from collections.abc import Sequence

import torch

from bench.measure import timing
from bench.measure.stand_in import stand_in
from rir_kernels.triton.shapes import Shape

SETTINGS = timing.Settings(rounds=9)
ONCE = timing.Settings(rounds=1, sample_ms=0.0, warmup=0)


@dataclasses.dataclass(frozen=True)
class Machine:
    dtype: torch.dtype = torch.bfloat16
    batch: int = 256
    repeats: int = 20
    calls: int = 10  # of what is only timed
    steps: int = 5  # of training
    impl: str = "auto"  # of networks
    settings: timing.Settings = SETTINGS
    arch: str = "sm_90"  # kernels are compiled for
    dry: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    @property
    def dtype_name(self) -> str:
        """As results and the compile gate call it."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp16"

    def some(self, shapes: Sequence[Shape]) -> Sequence[Shape]:
        """All of them on a GPU, as many as the interpreter has the time for on the stand-in."""
        return shapes[::10] if self.dry else shapes

    def sized(self, shape: Shape) -> Shape:
        """The shape at this machine's size: as it is on a GPU, small enough for the interpreter on the stand-in."""
        if not self.dry:
            return dataclasses.replace(shape, batch=self.batch if shape.batch == 256 else shape.batch)
        c_in, c_out = (min(c, 16) for c in (shape.c_in, shape.c_out))
        # an odd image stays odd
        size = min(shape.size, 5 if shape.size % 2 else 4)
        return dataclasses.replace(shape, c_in=c_in, c_out=c_out, size=size, batch=2 if shape.batch == 256 else 3)


def prepare(dry: bool) -> tuple[Machine, contextlib.AbstractContextManager]:
    """(the machine, the context to work in); RuntimeError where there is neither a GPU nor the wish for none."""
    if dry:
        return Machine(
            torch.float16, batch=2, repeats=1, calls=1, steps=2, impl="triton", settings=ONCE, dry=True
        ), stand_in()
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is there: pass --dry to run the same steps on a stand-in")
    major, minor = torch.cuda.get_device_capability()
    return Machine(arch=f"sm_{major}{minor}"), contextlib.nullcontext()
