"""`python -m bench simulate`."""

import argparse
import dataclasses
from pathlib import Path

from bench.cases.selection import batch_of, known, named_shape
from rir_kernels.triton.shapes import SHAPE_TABLE

OPS = ("train", "infer", "dgrad", "dgsums", "wgrad")
DTYPES = ("bf16", "fp16")
_CHECK = (
    "compare plain matmuls with figures that others measured, and fail if one is more than 15 %% off; persistent ones "
    "come out 9 to 21 %% too fast: they are shown, not judged"
)


def add_simulate(commands: argparse._SubParsersAction) -> None:
    """The command's arguments."""
    parser = commands.add_parser("simulate", help="how long the kernels would take, simulated from their machine code")
    some = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--shapes", **some, default=[], help="rows of the shape table, such as 96@32; default: all")
    parser.add_argument("--ops", **some, default=OPS, help=f"{', '.join(OPS)}; default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument("--batch", default="256", metavar="N", help="images; default: %(default)s")
    parser.add_argument("--tile", help="of the convolution, in quotes, as --explain prints it")
    parser.add_argument("--explain", action="store_true", help="the tiles, and where each kernel's clocks go")
    parser.add_argument("--out", type=Path, metavar="DIR", help="leave simulated.json there")
    parser.add_argument("--check", action="store_true", help=_CHECK)
    parser.set_defaults(run=_simulate)


def _simulate(options, arguments):
    if options.check:
        from bench.simulate.check import check

        return 0 if check() else 1
    from bench.simulate.run import run
    from bench.simulate.tiles import tile_of

    ops = known("--ops", options.ops, OPS)
    if options.tile and "wgrad" in ops:
        raise ValueError("--tile is the convolution's: name --ops without wgrad")
    tile = tile_of(options.tile) if options.tile else None
    table = [named_shape(name) for name in options.shapes] or SHAPE_TABLE
    shapes = [dataclasses.replace(shape, batch=batch_of(options.batch)) for shape in table]
    good = run(shapes, ops, options.dtype, tile=tile, explain=options.explain, out=options.out, command=arguments)
    return 0 if good else 1
