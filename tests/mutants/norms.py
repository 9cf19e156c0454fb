"""Faults of the normalization kernels, their launchers and the batch norm's state."""

from .mutant import Mutant

NORM, POINTWISE, ACTIVATIONS, LAUNCH = (
    f"rir_kernels/triton/{name}.py"
    for name in ("kernels/batchnorm", "kernels/pointwise", "kernels/activations", "launch/batchnorm")
)
TESTS = "tests/kernels/test_batchnorm.py"


def _apply(*cases):
    return tuple(f"{TESTS}::test_apply_and_backward[{case}]" for case in cases)


STATISTICS = (f"{TESTS}::test_statistics",)
STEPS = (f"{TESTS}::test_programs_of_several_steps",)
MERGE = (f"{TESTS}::test_merge_of_many_tiles",)
MANY_SPLITS = (f"{TESTS}::test_sum_of_many_splits",)
LARGE_MEAN = (f"{TESTS}::test_large_mean_small_deviation",)
CONSTANT = ("tests/faults/test_rows_11_20.py::test_row_19_constant_channels_and_huge_means[constant-triton]",)
NAN = ("tests/kernels/test_norm_act.py::test_nan_stays_in_its_channel[train-cpu-float32]",)
AT_ZERO = (f"{TESTS}::test_the_relus_gradient_at_zero_and_at_a_nan",)
TRAIN, RESIDUALS = (_apply(f"True-{case}-cpu-float32-(3, 5, 7, 3)") for case in ("relu", "residuals after the norm"))
EVAL = ("tests/kernels/test_norm_act.py::test_exact_with_small_integers[cpu-float32]",)
STATE = tuple(
    f"tests/kernels/test_norm_act.py::test_state_as_a_batch_norm_updates_it[{momentum}-cpu-float32]"
    for momentum in (0.3, None)
)
SLICES = (f"{TESTS}::test_channel_slices_are_read_in_place_or_copied",)
BEYOND = ("tests/kernels/test_upstream.py::test_the_mask_of_a_nan_and_what_lies_beyond_the_image[cpu-float32]",)
BOUNDS = ("tests/kernels/test_bounds.py::test_a_norm_writes_nothing_beyond",)
OFFSETS = ("tests/kernels/test_offsets.py",)
WITHOUT_PLANS = ("tests/kernels/test_layer.py::test_within_the_budget[train-hybrid-cpu-float32-P1 conv, BN, ReLU]",)
LAYER = ("tests/kernels/test_layer.py::test_within_the_budget[train-triton-cpu-float32-P3 residual after the norm]",)

NORMS = [
    # statistics
    Mutant(
        "stats: rows past the end counted", NORM,
        "tl.minimum(M - first, BLOCK_M)", "tl.minimum(M, BLOCK_M)", STATISTICS,
    ),
    Mutant(
        "stats: rows past the end in M2", POINTWISE,
        "deviation = tl.where(valid, values - tl.expand_dims(mean, AXIS), 0.0)",
        "deviation = values - tl.expand_dims(mean, AXIS)", STATISTICS,
    ),
    Mutant(
        "stats: E[x^2] - E[x]^2", POINTWISE,
        "return mean, tl.sum(deviation * deviation, AXIS)",
        "return mean, tl.sum(tl.where(valid, values * values, 0.0), AXIS) - count * mean * mean", LARGE_MEAN,
    ),
    Mutant(
        "stats: a step's rows read twice, others not", NORM,
        "first = (tile.to(tl.int64) * steps + step) * BLOCK_M", "first = (tile.to(tl.int64) + step) * BLOCK_M", STEPS,
    ),
    Mutant(
        "stats: only the first program's count is stored", NORM,
        "mask=pid % BLOCKS_C == 0", "mask=pid == 0", STATISTICS,
    ),
    Mutant(
        "stats: tiles' moments in 16 bits", LAUNCH,
        "torch.empty((tiles, channels), dtype=torch.float32",
        "torch.empty((tiles, channels), dtype=torch.float16", STATISTICS,
    ),
    Mutant(
        "merge: M2's correction dropped from Chan's update", POINTWISE,
        "m2 + m2_b + delta * delta * (count * weight)", "m2 + m2_b", STEPS,
    ),
    Mutant(
        "merge: both sides taken as equally many", POINTWISE,
        "weight = count_b / tl.maximum(total, 1.0)", "weight = tl.where(count == 0.0, 1.0, 0.5)", STEPS,
    ),
    Mutant(
        "merge: tiles' means not weighted by their counts", NORM,
        "tl.sum(weight * shift, 0) / tl.maximum(block_count, 1.0)",
        "tl.sum(shift, 0) / tl.sum(is_tile.to(tl.float32), 0)", MERGE,
    ),
    Mutant(
        "merge: deviations not weighted by the counts", NORM,
        "tl.sum(tile_m2 + weight * deviation * deviation, 0)", "tl.sum(tile_m2 + deviation * deviation, 0)", MERGE,
    ),
    Mutant(
        "merge: only the first block of tiles", NORM,
        "for first in tl.range(0, tiles, BLOCK_T):", "for first in tl.range(0, tl.minimum(tiles, BLOCK_T), BLOCK_T):",
        MERGE,
    ),
    Mutant(
        "merge: eps outside the root", NORM,
        "1.0 / tl.sqrt_rn(var + eps), mask=is_channel", "1.0 / (tl.sqrt_rn(var) + eps), mask=is_channel", CONSTANT,
    ),
    Mutant(
        "merge: mask dropped from the stores", NORM,
        "tl.store(mean_ptr + channel, mean, mask=is_channel)", "tl.store(mean_ptr + channel, mean)", BOUNDS,
    ),
    # running statistics
    Mutant(
        "running variance: n for n - 1", NORM, "m2 / tl.maximum(count - 1.0, 1.0)", "m2 / count", STATE[:1],
    ),
    Mutant(
        "running variance: n for n - 1, without a plan", "rir_kernels/common/running_statistics.py",
        "momentum * pixels / (pixels - 1)]", "momentum]", WITHOUT_PLANS,
    ),
    Mutant(
        "running mean: momentum on the wrong side", NORM,
        "(1.0 - momentum) * running + momentum * batch", "momentum * running + (1.0 - momentum) * batch", MERGE,
    ),
    Mutant(
        "batches counted by every program", NORM,
        "is_first = tl.program_id(0) == 0", "is_first = tl.program_id(0) >= 0", MERGE,
    ),
    Mutant(
        "batches not counted", NORM, "mask=is_first, other=0) + 1", "mask=is_first, other=0)", MERGE,
    ),
    Mutant(
        "cumulative average: the batch not counted", "rir_kernels/dispatch/bn_state.py",
        "1.0 / float(batches + 1)", "1.0 / max(1.0, float(batches))", STATE[1:],
    ),
    Mutant(
        "evaluation: eps dropped", NORM,
        "1.0 / tl.sqrt_rn(var + eps), mask=channel < C)", "1.0 / tl.sqrt_rn(var), mask=channel < C)", EVAL,
    ),
    # apply
    Mutant(
        "apply: mask dropped from the store", NORM,
        "mask = is_row & (channel < C)[None, :]\n    tl.store(y_ptr", "mask = is_row\n    tl.store(y_ptr", BOUNDS,
    ),
    Mutant(
        "apply: rows of 32 bits", NORM,
        "row = (pid // BLOCKS_C).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)\n"
        "    channel = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)\n"
        "    is_row = (row < M)[:, None]\n    mean",
        "row = (pid // BLOCKS_C) * BLOCK_M + tl.arange(0, BLOCK_M)\n"
        "    channel = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)\n"
        "    is_row = (row < M)[:, None]\n    mean",
        OFFSETS,
    ),
    Mutant(
        "apply: residual read past its channels", NORM,
        "_load_rows(residual1_ptr, row, channel, residual1_stride, C_RES1, is_row)",
        "_load_rows(residual1_ptr, row, channel, residual1_stride, C, is_row)", RESIDUALS,
    ),
    Mutant(
        "apply: branch_scale not applied", NORM,
        "normalize(z, mean, invstd, gamma, beta) * branch_scale", "normalize(z, mean, invstd, gamma, beta)", RESIDUALS,
    ),
    Mutant(
        "apply: branch_scale on the residual too", NORM,
        "y += _load_rows(residual0_ptr", "y += branch_scale * _load_rows(residual0_ptr", RESIDUALS,
    ),
    # without its flag tl.maximum still propagates NaN in the interpreter, on a GPU it does not
    Mutant(
        "relu: NaN swallowed", ACTIVATIONS,
        "tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)", "tl.where(u > 0.0, u, 0.0)", NAN,
    ),
    # backward
    Mutant(
        "relu's gradient passes at zero", ACTIVATIONS, "tl.where(u <= 0, 0.0, dy)", "tl.where(u < 0, 0.0, dy)", AT_ZERO,
    ),
    Mutant(
        "relu's gradient swallowed at a NaN", ACTIVATIONS,
        "tl.where(u <= 0, 0.0, dy)", "tl.where(u > 0, dy, 0.0)", AT_ZERO,
    ),
    Mutant(
        "sign of a sum after the norm taken from z", NORM,
        "u = _load_rows(y_ptr, row, channel, C, C, is_row)", "u = normalize(z, mean, invstd, gamma, beta)", RESIDUALS,
    ),
    Mutant(
        "sign of a sum after the norm not saved", "rir_kernels/autograd/function.py",
        "sign = None if determined or spec.activation is None else y", "sign = None", LAYER,
    ),
    Mutant(
        "reduce: a step's rows read twice, others not", NORM,
        "row = (split.to(tl.int64) * steps + step) * BLOCK_M", "row = (split.to(tl.int64) + step) * BLOCK_M", STEPS,
    ),
    Mutant(
        "reduce: mask of the rows dropped", NORM,
        "tl.sum(tl.where(is_row, dy * ((z - mean) * invstd), 0.0), 0)", "tl.sum(dy * ((z - mean) * invstd), 0)", BEYOND,
    ),
    Mutant(
        "reduce: dy's own spacing ignored", NORM,
        "dy = _load_rows(dy_ptr, row, channel, dy_stride, C, is_row)",
        "dy = _load_rows(dy_ptr, row, channel, C, C, is_row)", SLICES,
    ),
    Mutant(
        "sum: only the first block of splits", NORM,
        "for first in tl.range(0, splits, BLOCK_S):",
        "for first in tl.range(0, tl.minimum(splits, BLOCK_S), BLOCK_S):", MANY_SPLITS,
    ),
    Mutant(
        "sum: a split dropped", NORM, "(split < splits)[:, None]", "(split < splits - 1)[:, None]", MANY_SPLITS,
    ),
    Mutant(
        "dz: the mean along xhat dropped", NORM,
        "dz -= (s1 + (z - mean) * invstd * s2) * inv_count", "dz -= s1 * inv_count", TRAIN,
    ),
    Mutant(
        "dz: means over the wrong count", LAUNCH, "1.0 / count,", "1.0 / (count - 1),", TRAIN,
    ),
    Mutant(
        "residual's gradient scaled with the branch", NORM,
        "tl.store(dres_ptr + offset, dy.to(dres_ptr.dtype.element_ty), mask=mask)",
        "tl.store(dres_ptr + offset, (dy * branch_scale).to(dres_ptr.dtype.element_ty), mask=mask)", RESIDUALS,
    ),
    Mutant(
        "residual's gradient lost", NORM,
        "tl.store(dres_ptr + offset, dy.to(dres_ptr.dtype.element_ty), mask=mask)",
        "tl.store(dres_ptr + offset, tl.zeros_like(dy).to(dres_ptr.dtype.element_ty), mask=mask)", LAYER,
    ),
]  # fmt: skip
