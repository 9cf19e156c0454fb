"""Which cases: by suite's ops, shapes, batches, dtypes; and what stands for "all" on this device."""

import dataclasses
import difflib

from bench.schema import DTYPES
from rir_kernels.triton.shapes import SHAPE_TABLE, TRANSITIONS, Shape

BATCH = 256
CPU_BATCH = 4  # a CPU takes minutes for what a GPU does in a millisecond
WIDE = ("96@32", "192@16", "384@8")  # the stages of RiR wide
WIDE_BATCHES = (1, 32, 128, 512)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What the command line asked for; an empty tuple stands for the suite's own choice."""

    device_type: str
    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    quick: bool = False

    @property
    def on_cpu(self) -> bool:
        return self.device_type == "cpu"

    def chosen_dtypes(self) -> tuple[str, ...]:
        if self.dtypes:
            return self.dtypes
        return ("fp32",) if self.on_cpu else ("bf16",) if self.quick else tuple(DTYPES)

    def chosen_ops(self, ops) -> tuple[str, ...]:
        return tuple(op for op in ops if not self.ops or op in self.ops)

    def chosen_shapes(self, *, quick: tuple[str, ...]) -> list[Shape]:
        """Rows of the shape table, each at its batch; `quick`: the names for a first look."""
        if self.shapes:
            table = [named_shape(name) for name in self.shapes]
        else:
            table = [named_shape(name) for name in quick] if self.quick else list(SHAPE_TABLE)
        batches = self.batches or ((CPU_BATCH,) if self.on_cpu else (BATCH,))
        return [dataclasses.replace(shape, batch=batch) for batch in batches for shape in table]

    def wide_shapes(self) -> list[Shape]:
        """The stages of RiR wide at small and large batches: part of the full choice alone."""
        if self.shapes or self.batches or self.quick or self.on_cpu:
            return []
        return [dataclasses.replace(named_shape(name), batch=batch) for batch in WIDE_BATCHES for name in WIDE]


def named_shape(name: str) -> Shape:
    """The row of that name, such as "96@32"; ValueError with the names there are."""
    table = {shape.name: shape for shape in (*SHAPE_TABLE, *TRANSITIONS)}
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown shape {name!r}{hint}; there are {', '.join(map(repr, table))}")
    return table[name]


def known(option: str, names, there: tuple[str, ...]) -> tuple[str, ...]:
    """The names, each once; ValueError for one that is not there."""
    for name in names:
        if name not in there:
            raise ValueError(f"{option}: unknown {name!r}; there are {', '.join(there)}")
    return tuple(dict.fromkeys(names))


def batch_of(text: str) -> int:
    """Images, at least one; ValueError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--batch: expected numbers of images, at least 1, got {text!r}")
    return int(text)
