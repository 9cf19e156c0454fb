"""Faults of what surrounds the kernels: plans, chains, recomputing, the ladder, dispatch, streams."""

from .mutant import Mutant

CHAINS = tuple(
    f"tests/kernels/test_chaining.py::test_where_the_gradient_is_another[{case}-cpu-float32]"
    for case in ("a hook", "a hook in place")
)
SCALED_CHAIN = ("tests/kernels/test_chaining.py::test_a_scale_after_the_norm_is_part_of_the_sums[cpu-float32]",)
KINDS = ("tests/kernels/test_eager.py::test_one_plan_a_kind[cpu-float32]",)
FORMATS = ("tests/kernels/test_fused_format.py::test_whose_rule_it_is_makes_another_plan",)
UNALIGNED = ("tests/kernels/test_eager.py::test_unaligned_memory_replays_no_plan[cpu-float32]",)
BOTH_WAYS = ("tests/kernels/test_eager.py::test_both_ways_agree[train-cpu-float32]",)
SLICES = ("tests/kernels/test_plan.py::test_slices_of_larger_tensors[cpu-float32]",)
TEMPORARIES = ("tests/kernels/test_plan.py::test_temporaries_do_not_overlap[cpu-float32]",)
FROZEN = ("tests/kernels/test_recompute.py::test_same_gradients_from_half_the_memory[frozen norm-hybrid-cpu-float32]",)
CHANGES = ("tests/kernels/test_recompute.py::test_changes_in_place[cpu-float32]",)
LADDER = ("tests/kernels/test_ladder.py::test_stages_go_first_and_then_the_cheapest_that_fits",)
LADDER_KEPT = ("tests/kernels/test_ladder.py::test_what_was_refused_is_not_tried_again",)
REFUSED = (
    "tests/kernels/test_layer.py::test_what_the_kernels_do_not_do_is_refused_by_name_and_done_by_hybrid[dilation]",
)
BIAS = ("tests/kernels/test_layer.py::test_within_the_budget[train-triton-cpu-float32-scaled before the norm, bias]",)
OP = ("tests/kernels/test_plans.py::test_the_op_repeats_its_plans[cpu-float32]",)
OF_A_BATCH = ("tests/kernels/test_tiles.py::test_few_tiles_serve_the_batches",)
STREAMS, JOINING = "tests/functional/test_streams.py", "tests/functional/test_joining.py"

CALLS = [
    Mutant(
        "chain: sums used where dy lies elsewhere", "rir_kernels/autograd/backward_fusion.py",
        "dy.data_ptr() == dx.data_ptr() and dy._version", "dy._version", CHAINS[:1],
    ),
    Mutant(
        "chain: sums used where dy has changed", "rir_kernels/autograd/backward_fusion.py",
        "dy._version == version and ", "", CHAINS[1:],
    ),
    Mutant(
        "chain: sums offered where the norm is scaled", "rir_kernels/autograd/function.py",
        "determined and spec.norm_scale == 1 and", "determined and", SCALED_CHAIN,
    ),
    Mutant(
        "plan: repeated for other strides", "rir_kernels/backends/plans.py",
        "(t.shape, t.stride(), ", "(t.shape, ", KINDS,
    ),
    Mutant(
        "plan: repeated for unaligned memory", "rir_kernels/backends/plans.py",
        ", t.data_ptr() % _ALIGNMENT) for t", ") for t", UNALIGNED,
    ),
    Mutant(
        "plan: repeated for another spec", "rir_kernels/dispatch/plan_cache.py",
        "return (*metadata, call.spec, call.training,", "return (*metadata, call.training,", KINDS,
    ),
    Mutant(
        "plan: repeated for another rule of memory format", "rir_kernels/dispatch/plan_cache.py",
        "torch_format, call.needs_grad(), impl)", "call.needs_grad(), impl)", FORMATS,
    ),
    Mutant(
        "plan: the op's repeated for other options", "rir_kernels/backends/plans.py",
        "key = (function, options, kind)", "key = (function, kind)", OP,
    ),
    Mutant(
        "plan: of the op for other tensors", "rir_kernels/backends/plans.py",
        "key = (function, options, kind)", "key = (function, options)", OP,
    ),
    Mutant(
        "batches: a tile too slow for one of them", "rir_kernels/triton/tiling/batches.py",
        "np.cumprod(good[first:], axis=0).sum(0)", "good[first:].sum(0)", OF_A_BATCH,
    ),
    Mutant(
        "batches: the first tile that lasts, not the fastest", "rir_kernels/triton/tiling/batches.py",
        "relative[first:end].sum(0), np.inf)", "1, np.inf)", OF_A_BATCH,
    ),
    Mutant(
        "plan: another tensor's offset forgotten", "rir_kernels/triton/plan/places.py",
        "buffer.storage_offset() + self.offset", "self.offset", SLICES,
    ),
    Mutant(
        "plan: temporaries in one place", "rir_kernels/triton/plan/plan.py",
        "size += -(-tensor.untyped_storage().nbytes() // 256) * 256",
        "size = max(size, -(-tensor.untyped_storage().nbytes() // 256) * 256)", TEMPORARIES,
    ),
    Mutant(
        "plan: a batch not counted without one", "rir_kernels/autograd/runners.py",
        "num_batches_tracked.add_(1)", "num_batches_tracked.add_(0)", BOTH_WAYS,
    ),
    Mutant(
        "recompute: by the batch's statistics", "rir_kernels/autograd/recomputation.py",
        "statistics = norm.Statistics(mean, None, invstd)",
        "statistics = norm.bn_finalize(norm.bn_stats(z), self._spec.eps)", FROZEN,
    ),
    Mutant(
        "recompute: from what has changed", "rir_kernels/autograd/recomputation.py",
        "if self._tensor._version != self._version:", "if self._tensor._version < self._version:", CHANGES,
    ),
    Mutant(
        "ladder: a tile that is hardly smaller", "rir_kernels/triton/launch/tile_fallback.py",
        "min(needs(tile) * error.limit // error.required, needs(tile) - 1)", "needs(tile) - 1", LADDER,
    ),
    Mutant(
        "ladder: the smaller tile not kept", "rir_kernels/triton/launch/tile_fallback.py",
        "tile = _kept[launch] = below", "tile = below", LADDER_KEPT,
    ),
    Mutant(
        "dispatch: dilation not refused", "rir_kernels/dispatch/choose.py",
        "if spec.dilation != (1, 1):", "if spec.dilation < (1, 1):", REFUSED,
    ),
    Mutant(
        "gradient of the bias not set to zero", "rir_kernels/backends/fused.py",
        "dbias = torch.empty_like(mean).zero_()", "dbias = torch.empty_like(mean)", BIAS,
    ),
    Mutant(
        "streams: blocks between the streams swapped", "rir_kernels/common/streams.py",
        "rows = [(rr, tr), (rt, tt)]", "rows = [(rr, rt), (tr, tt)]",
        (f"{STREAMS}::test_packed_convolution_is_the_four_convolutions",),
    ),
    Mutant(
        "streams: shortcut from the last channels", "rir_kernels/common/spec.py",
        "x = x[:, : self.shortcut_channels]", "x = x[:, -self.shortcut_channels :]",
        ("tests/kernels/test_conv.py::test_shortcut_inside_the_kernels[(8, 8, 5)-1-cpu-float32]",),
    ),
    Mutant(
        "joined streams: gradients swapped", "rir_kernels/common/stream_views.py",
        "return split(grad, ctx.channels)", "return split(grad, ctx.channels)[::-1]",
        (f"{JOINING}::test_gradcheck_twice",),
    ),
    Mutant(
        "split streams: gradients swapped", "rir_kernels/common/stream_views.py", "return join(dr, dt), None",
        "return join(dt, dr), None", (f"{JOINING}::test_gradcheck_of_a_split",),
    ),
    Mutant(
        "split streams: one gradient in the other's channels", "rir_kernels/common/stream_views.py",
        "0, 0, 0, 0, before, behind", "0, 0, 0, 0, behind, before",
        (f"{JOINING}::test_gradients_of_a_split_keep_their_format",),
    ),
    Mutant(
        "joined streams: a gap between them read", "rir_kernels/common/stream_views.py",
        "t.storage_offset() == r.storage_offset() + r.shape[1] * r.stride(1)",
        "t.storage_offset() >= r.storage_offset() + r.shape[1] * r.stride(1)",
        (f"{JOINING}::test_apart_is_a_copy",),
    ),
]  # fmt: skip
