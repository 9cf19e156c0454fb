"""Faults of the convolution: forward pass, inference and data gradient."""

from .mutant import Mutant

CONV, DGRAD, TAPS, BOXES, LAUNCH, PACKING = (
    f"rir_kernels/triton/{name}.py"
    for name in ("kernels/conv", "kernels/dgrad", "kernels/conv_loops", "kernels/tma", "launch/conv", "launch/packing")
)


def _kernels(file, function, *cases):
    """The tests of one function, with these parameters after the target's."""
    return tuple(f"tests/kernels/test_{file}.py::{function}[cpu-float32-{case}]" for case in cases)


def _integers(*cases):
    return _kernels("conv", "test_integers_bit_for_bit", *cases)


def _tiles(*cases):
    return _kernels("tiles", "test_every_tile_computes_the_same", *cases)


def _planes(*cases):
    return _kernels("dgrad", "test_one_launch_writes_every_pixel", *cases)


SHORTCUT = tuple(
    f"tests/kernels/test_conv.py::test_shortcut_inside_the_kernels[(8, 8, 5)-{stride}-cpu-float32]" for stride in (1, 2)
)
EPILOGUE = ("tests/kernels/test_conv.py::test_epilogue_adds_two_residuals_and_scales_the_branch_alone[cpu-float32]",)
STATISTICS = tuple(
    f"tests/kernels/test_batchnorm.py::test_statistics_of_the_convolutions_epilogue[{stride}-cpu-float32]"
    for stride in (2, 1)
)
INFERENCE = tuple(
    f"tests/kernels/test_layer.py::test_inference_with_a_gradient_normalizes_the_z_that_it_saves[cpu-{dtype}]"
    for dtype in ("float32", "float16")
)
UPSTREAM = _kernels("upstream", "test_integers_bit_for_bit", "three groups-odd sides")
POINTERS = _kernels("boxes", "test_pointers_read_what_descriptors_do", "stride")
BOUNDS = ("tests/kernels/test_bounds.py::test_a_convolution_writes_nothing_beyond",)
OFFSETS = ("tests/kernels/test_offsets.py",)

CONVOLUTION = [
    # main loops
    Mutant(
        "conv: last tap skipped", TAPS,
        "for step in tl.range(TAPS_H * TAPS_W * K_BLOCKS):", "for step in tl.range(TAPS_H * TAPS_W * K_BLOCKS - 1):",
        _integers("1x3", "3x3 stride 2 valid"),
    ),
    Mutant(
        "conv: padding off by one", TAPS,
        "(FIRST_W - PAD[1] - PLANE_W) // STRIDE[1]", "(FIRST_W - PAD[1] - PLANE_W) // STRIDE[1] + 1",
        _integers("1x3", "3x3 stride 2 valid"),
    ),
    Mutant(
        "conv: parity classes without the padding", TAPS,
        "FIRST_H: tl.constexpr = (PLANE_H + PAD[0]) % STRIDE[0]", "FIRST_H: tl.constexpr = PLANE_H % STRIDE[0]",
        _planes("one row", "even"),
    ),
    Mutant(
        "conv: groups of channels share one weight", TAPS,
        "weight = _load_weight(w_desc, tap, c + block * BLOCK_C, k,",
        "weight = _load_weight(w_desc, tap, c, k,",
        _tiles("many channels-three groups"),
    ),
    Mutant(
        "conv: sums in 16 bits", TAPS,
        "tl.dot(weight, x, accs[block], input_precision=PRECISION),)",
        "tl.dot(weight, x, accs[block], input_precision=PRECISION).to(tl.float16).to(tl.float32),)",
        _kernels("conv", "test_forward_and_both_gradients", "1x3"),
    ),
    Mutant(
        "rows: weight not flipped in the data gradient", TAPS,
        "rows[row + i if SIGN == 1 else row + TAPS - 1 - i]", "rows[row + i]", _tiles("over the edges-rows and groups"),
    ),
    Mutant(
        "rows: the data gradient padded like the forward pass", TAPS,
        "PAD[0] if SIGN == 1 else TAPS - 1 - PAD[0]", "PAD[0]", _tiles("without padding-two rows"),
    ),
    Mutant(
        "inside: edge of the wrong side in the data gradient", TAPS,
        "first_i = (h == (0 if SIGN == 1 else H - 1))", "first_i = (h == 0)", _tiles("even-no padding"),
    ),
    Mutant(
        "inside: taps of the edges skipped", TAPS, "if taps >= 6:", "if taps > 6:", _tiles("even-no padding")
    ),
    Mutant(
        "inside: a corner computed twice, another skipped", TAPS,
        "corner % 2 * (W - 1)", "0 * (W - 1)", _tiles("even-no padding"),
    ),
    Mutant(
        "fold: mask of the taps dropped", TAPS,
        "(i >= 0) & (i < 3) & (j >= 0) & (j < 3)", "(i >= 0) & (i < 3) & (j >= 0)", _tiles("even-blocks of pixels"),
    ),
    Mutant(
        "fold: weight not flipped in the data gradient", TAPS,
        "tap = i * 3 + j if SIGN == 1 else 8 - i * 3 - j", "tap = i * 3 + j", _tiles("even-blocks of pixels"),
    ),
    # what is read by pointers
    Mutant(
        "boxes: mask of the padding above dropped", BOXES,
        "return (first + index >= 0) & (first + index < SIZE)", "return first + index < SIZE", POINTERS,
    ),
    Mutant(
        "boxes: mask of the rows below dropped", BOXES,
        "return (first + index >= 0) & (first + index < SIZE)", "return first + index >= 0", POINTERS,
    ),
    Mutant(
        "boxes: offsets of 32 bits", BOXES,
        "strides = source[5].to(tl.int64), source[6].to(tl.int64), source[7].to(tl.int64)",
        "strides = source[5], source[6], source[7]", OFFSETS,
    ),
    # tiles and epilogue
    Mutant(
        "conv: tiles of images overlap", CONV,
        "n = tile // (TILES_W * TILES_H) * BOX[0]", "n = tile // (TILES_W * TILES_H)", _integers("many images"),
    ),
    Mutant(
        "conv: offsets of 32 bits", CONV, "pixel_n.to(tl.int64) * stride_n", "pixel_n * stride_n", OFFSETS,
    ),
    Mutant(
        "conv: mask of the pixels dropped from the stores", CONV,
        "mask = (channel < C_OUT)[:, None] & is_pixel[None, :]",
        "mask = (channel < C_OUT)[:, None] & (offset >= 0)[None, :]", BOUNDS,
    ),
    Mutant(
        "conv: mask of the channels dropped from the stores", CONV,
        "mask = (channel < C_OUT)[:, None] & is_pixel[None, :]", "mask = (channel >= 0)[:, None] & is_pixel[None, :]",
        BOUNDS,
    ),
    Mutant(
        "conv: mask dropped from the statistics' stores", CONV,
        "tl.store(moments.m2 + offset + channel, m2, mask=channel < C_OUT)",
        "tl.store(moments.m2 + offset + channel, m2)", BOUNDS,
    ),
    Mutant(
        "statistics: lanes beyond the image in the mean", CONV,
        "total += tl.sum(tl.where(is_pixel[None, :], tiles[row], 0.0), 1)", "total += tl.sum(tiles[row], 1)",
        STATISTICS,
    ),
    Mutant(
        "statistics: sums beyond the image left as they are", CONV,
        "if count < P * ROWS:", "if count < 0:", _tiles("odd channels-two groups"),
    ),
    Mutant(
        "statistics: lanes beyond the image in M2", CONV,
        "deviation = tl.where(is_pixel[None, :], tiles[row] - mean[:, None], 0.0)",
        "deviation = tiles[row] - mean[:, None]", STATISTICS,
    ),
    Mutant(
        "statistics: a tile counted as if it were whole", CONV,
        "* tl.minimum(BOX[2], W - w)", "* BOX[2]", STATISTICS,
    ),
    Mutant(
        "upstream: pixels beyond the image in the sums", CONV,
        "if count < P * ROWS:", "if count < 0:", UPSTREAM,
    ),
    Mutant(
        "upstream: mean not taken out", CONV,
        "tl.sum(dy * (z - mean[:, None]), 1) * invstd", "tl.sum(dy * z, 1) * invstd", UPSTREAM,
    ),
    Mutant(
        "conv: bias dropped", CONV,
        "acc += load_channels(bias_ptr, channel, C_OUT, 0.0)[:, None]", "acc += 0.0", EPILOGUE,
    ),
    Mutant(
        "conv: branch_scale on the residual too", CONV,
        "    if addend0_desc is not None:\n        acc += load_addend(addend0_desc, n, h, w, c, BOX, BLOCK_C)\n",
        "    if addend0_desc is not None:\n"
        "        acc += (1.0 if branch_scale is None else branch_scale) "
        "* load_addend(addend0_desc, n, h, w, c, BOX, BLOCK_C)\n",
        EPILOGUE,
    ),
    Mutant(
        "conv: branch_scale not applied", CONV, "acc *= branch_scale", "acc *= 1.0", EPILOGUE,
    ),
    Mutant(
        "inference: eps dropped", CONV,
        "norm.var, channel, C_OUT, 1.0) + norm.eps)", "norm.var, channel, C_OUT, 1.0))", INFERENCE,
    ),
    Mutant(
        "inference: y of the z that is not rounded", CONV,
        "y = round_as(y, x_desc)\n            _store", "_store", INFERENCE,
    ),
    # the data gradient at strides of two
    Mutant(
        "dgrad: weight not flipped", DGRAD, "-1, WEIGHT_T, BOX", "1, WEIGHT_T, BOX", _planes("even"),
    ),
    Mutant(
        "dgrad: two planes swapped", DGRAD,
        "PLANES[index][0], PLANES[index][1], -1", "PLANES[index][1], PLANES[index][0], -1",
        _planes("even"),
    ),
    Mutant(
        "dgrad: the shortcut joins the odd columns too", DGRAD,
        "if plane_h + plane_w == 0:", "if plane_h == 0:", SHORTCUT[1:],
    ),
    Mutant(
        "dgrad: planes of odd images one row too high", DGRAD,
        "plane_height = (H - plane_h + STRIDE[0] - 1) // STRIDE[0]",
        "plane_height = (H + STRIDE[0] - 1) // STRIDE[0]", BOUNDS,
    ),
    # launchers
    Mutant(
        "data gradient launched as a forward pass", LAUNCH,
        "SIGN=-1 if self.gradient else 1", "SIGN=1", _integers("1x3"),
    ),
    Mutant(
        "data gradient: the residual's part lost", LAUNCH,
        '[dz[:, : spec.shortcut_channels]] if spec.shortcut_channels else []', "[]", SHORTCUT,
    ),
    Mutant(
        "data gradient: one channel of the shortcut too few", LAUNCH,
        "[dz[:, : spec.shortcut_channels]]", "[dz[:, : spec.shortcut_channels - 1]]", SHORTCUT,
    ),
    Mutant(
        "inference: residual joined before the norm", LAUNCH,
        "POST_NORM=spec.post_norm and not self.gradient", "POST_NORM=False", INFERENCE,
    ),
    Mutant(
        "weight packed without a turn", PACKING,
        "weight.permute(2, 3, 1, 0) if transposed else weight.permute(2, 3, 0, 1)",
        "weight.permute(2, 3, 0, 1) if transposed else weight.permute(2, 3, 0, 1)",
        ("tests/kernels/test_launches.py::test_packed_weight",),
    ),
    Mutant(
        "weight truncated to TF32", "rir_kernels/triton/kernels/weight_packing.py",
        "(weight.to(tl.int32, bitcast=True) + 0x1000) & -0x2000", "weight.to(tl.int32, bitcast=True) & -0x2000",
        ("tests/kernels/test_launches.py::test_rounding_to_tf32",),
    ),
]  # fmt: skip
