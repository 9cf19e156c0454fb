"""Faults of the weight gradient: its tiles, its edges, and the sum over its slots."""

from .mutant import Mutant

WGRAD = "rir_kernels/triton/kernels/wgrad.py"
LAUNCH = "rir_kernels/triton/launch/wgrad.py"
TESTS = "tests/kernels/test_wgrad.py"


def _tile(*cases):
    return tuple(f"{TESTS}::test_every_tile_computes_the_same[cpu-float32-{case}]" for case in cases)


def _split(*cases):
    return tuple(f"{TESTS}::test_every_tile_in_every_split[cpu-float32-{case}]" for case in cases)


SCALE = (f"{TESTS}::test_a_scale_and_a_second_run_bit_for_bit[cpu-float32]",)
BOUNDS = ("tests/kernels/test_bounds.py::test_a_convolution_writes_nothing_beyond",)
ORDER = (f"{TESTS}::test_many_slots_are_added_in_one_order[cpu-float32]",)

WEIGHT_GRADIENT = [
    Mutant(
        "wgrad: rows that are shared not moved", WGRAD, "rows[row + i], accs[i]", "rows[i], accs[i]",
        _split("row, pairs-one"),
    ),
    Mutant(
        "wgrad: padding off by one", WGRAD, "dw = j - PAD[1]", "dw = j - PAD[1] + 1", _tile("a row-images"),
    ),
    Mutant(
        "wgrad: parity classes without the padding", WGRAD,
        "if (j + PAD[1]) % 2 == 1:", "if j % 2 == 1:", _tile("stride (1, 2)-row, pairs"),
    ),
    Mutant(
        "wgrad: edge of the image taken with the left taps", WGRAD,
        "first_w = (j == 0).to(tl.int32)", "first_w = (j == 2).to(tl.int32)", _split("images, two rows-one"),
    ),
    Mutant(
        "wgrad: mask of the channels dropped from the stores", WGRAD,
        "mask = (co_range < C_OUT)[:, None] & (ci_range < C_IN)[None, :]", "mask = (co_range < C_OUT)[:, None]",
        BOUNDS,
    ),
    Mutant(
        "wgrad: tiles of the program before computed again", WGRAD,
        "tl.range(tl.maximum(first, begin) - begin,", "tl.range(0,", _split("images, 32 channels-four"),
    ),
    Mutant(
        "wgrad: last tile of a program skipped", WGRAD,
        "tl.minimum(end, stop) - begin)", "tl.minimum(end - 1, stop) - begin)", _split("row-one"),
    ),
    Mutant(
        "wgrad: last tap's row left out", WGRAD,
        "accs[i], mask=mask)", "accs[0], mask=mask)", _tile("a column-row, pairs"),
    ),
    Mutant(
        "wgrad: sums in 16 bits", WGRAD,
        "(tl.dot(dz, rows[row + i], accs[i], input_precision=PRECISION),)",
        "(tl.dot(dz, rows[row + i], accs[i], input_precision=PRECISION).to(tl.float16).to(tl.float32),)",
        SCALE,
    ),
    Mutant(
        "wgrad: a slot dropped where positions share programs", WGRAD,
        "(stop - 1) // TILES_PER_PROGRAM - begin // TILES_PER_PROGRAM + 1, VECTOR",
        "tl.maximum((stop - begin) // TILES_PER_PROGRAM, 1), VECTOR",
        _split("images, 32 channels-four", "row, four rows-four"),
    ),
    Mutant(
        "wgrad: a slot added that nobody wrote", WGRAD,
        "(stop - 1) // TILES_PER_PROGRAM - begin // TILES_PER_PROGRAM + 1, VECTOR",
        "stop // TILES_PER_PROGRAM - begin // TILES_PER_PROGRAM + 1, VECTOR",
        _split("images-all"),
    ),
    Mutant(
        "wgrad: only the first block of slots", WGRAD,
        "for start in tl.range(0, SLOTS, BLOCK_S):", "for start in tl.range(0, tl.minimum(SLOTS, BLOCK_S), BLOCK_S):",
        ORDER,
    ),
    Mutant(
        "wgrad: slots added in an order that varies", LAUNCH,
        "BLOCK_S=ROWS_TILE // block",
        "BLOCK_S=(64, 4)[setattr(_launch, 'calls', getattr(_launch, 'calls', 0) + 1) or _launch.calls % 2]",
        ORDER,
    ),
    Mutant(
        "wgrad: branch_scale not applied", WGRAD, "(acc * scale)", "acc", SCALE,
    ),
    Mutant(
        "wgrad: pixels of a pack mixed", WGRAD,
        "from_first % PACK * C_IN + ci", "a % PACK * C_IN + ci", _split("images, fours-four"),
    ),
]  # fmt: skip
