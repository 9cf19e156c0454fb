"""Faults of the compiled path, which Triton's interpreter cannot see: of what the compiler is told, of what its code
does otherwise than Python, of what the host hands to the driver, of what is asynchronous."""

from .mutant import Mutant

TRITON, KERNELS, MACHINE = "rir_kernels/triton", "tests/kernels", "tests/machine"
NORM, POINTWISE, ACTIVATIONS, CONV, TAPS, BOXES = (
    f"{TRITON}/kernels/{name}.py" for name in ("batchnorm", "pointwise", "activations", "conv", "conv_loops", "tma")
)
COMPILED, PLACES, PLAN, RUNTIME, WGRAD = (
    f"{TRITON}/{name}.py" for name in ("plan/compiled", "plan/places", "plan/plan", "launch/runtime", "launch/wgrad")
)


def _seen(test, target="cuda-bfloat16", interpreted=("cpu-float32", "cpu-float16")):
    """(tests, unseen) of one test, by its target: {} in its name."""
    return (f"{KERNELS}/{test.format(target)}",), tuple(f"{KERNELS}/{test.format(one)}" for one in interpreted)


def _on_fp32(test):
    return _seen(test, "cuda-float32", ("cpu-float32",))


def _on_bf16(test):
    return _seen(test, interpreted=("cpu-float32",))


def _machine(test, unseen):
    """A test that only the emulated GPU runs, and what the interpreter has in its place."""
    return (f"{MACHINE}/test_mutant_{test}",), (f"{KERNELS}/{unseen}",)


SLICES_OF_A_PLAN = _seen("test_plan.py::test_slices_of_larger_tensors[{}]")
REPEATED = "test_plan.py::test_repeats_for_other_tensors[cpu-float32]"
NUMBERS = "test_plan.py::test_numbers_that_change_from_call_to_call[cpu-float32]"
STREAM = _machine("launches.py::test_a_plan_launches_on_the_current_stream", REPEATED)
CALL = _machine("launches.py::test_a_plan_takes_the_numbers_and_the_addresses_of_the_call", NUMBERS)
SAVED_Z = "test_layer.py::test_inference_with_a_gradient_normalizes_the_z_that_it_saves[{}]"

COMPILED_PATH = [
    # what compiled code does otherwise than Python
    Mutant(
        "compiled: what follows a return in a compile-time branch", POINTWISE,
        "    else:  # Triton compiles what follows a return, but not the branch that is not taken\n        return",
        "    return",
        *_on_bf16("test_bounds.py::test_a_norm_writes_nothing_beyond[{}]"),
    ),
    Mutant(
        "compiled: NaN lost in the hardware's maximum", ACTIVATIONS,
        "tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)", "tl.maximum(u, 0.0)",
        *_on_bf16("test_norm_act.py::test_nan_stays_in_its_channel[train-{}]"),
    ),
    Mutant(
        "compiled: channels read beyond their end", POINTWISE,
        "tl.load(ptr + channels, mask=channels < C, other=default)", "tl.load(ptr + channels)",
        *_seen("test_batchnorm.py::test_apply_and_backward[True-relu-{}-(3, 5, 7, 3)]"),
    ),
    Mutant(
        "compiled: blocks of pixels in the layout's order", TAPS,
        "acc.permute([2, 3, 0, 4, 1]).reshape([BLOCK_C, 4 * BLOCKS])",
        "acc.permute([2, 3, 0, 4, 1]).reshape([BLOCK_C, 4 * BLOCKS], can_reorder=True)",
        *_on_bf16("test_tiles.py::test_blocks_of_pixels_compute_the_same[{}-16 channels]"),
    ),
    # rounding
    Mutant(
        "compiled: statistics of bf16 in bf16", NORM,
        "mask=mask, other=0.0).to(tl.float32)\n        rows = ",
        "mask=mask, other=0.0)\n        z = z.to(tl.float32) if z.dtype == tl.float16 else z\n        rows = ",
        *_seen("test_batchnorm.py::test_statistics[{}-(2, 8, 5, 5)]"),
    ),
    Mutant(
        "compiled: 16 bits taken for fp16", BOXES,
        "return values.to(source.dtype).to(tl.float32)",
        "return values.to(tl.float16 if source.dtype.primitive_bitwidth == 16 else tl.float32).to(tl.float32)",
        *_seen(SAVED_Z),
    ),
    Mutant(
        "compiled: TF32 whatever torch's switch says", RUNTIME,
        "operand.dtype == torch.float32 and tf32_allowed() and not on_cpu",
        "operand.dtype == torch.float32 and not on_cpu",
        *_on_fp32("test_conv.py::test_forward_and_both_gradients[{}-odd channels]"),
    ),
    Mutant(
        "compiled: the weight gradient's products in TF32", WGRAD,
        "PRECISION=dot_precision(x)", 'PRECISION="tf32"',
        *_on_fp32("test_conv.py::test_forward_and_both_gradients[{}-3x3 valid]"),
    ),
    # what the compiler is told
    Mutant(
        "compiled: every row promised to be aligned", NORM,
        "return tl.load(ptr + row[:, None] * stride + channel",
        "return tl.load(ptr + tl.multiple_of(row * stride, 8)[:, None] + channel",
        *_seen("test_batchnorm.py::test_channel_slices_are_read_in_place_or_copied[{}]"),
    ),
    Mutant(
        "compiled: a view that is not aligned, planned", COMPILED,
        "if where.start % ALIGNMENT:", "if where.start % 4:",
        *_machine(
            "launches.py::test_a_plan_takes_no_view_that_is_not_aligned",
            "test_plan.py::test_slices_of_larger_tensors[cpu-float32]",
        ),
    ),
    Mutant(
        "compiled: temporaries that are not aligned", PLAN,
        "size += -(-tensor.untyped_storage().nbytes() // 256) * 256", "size += tensor.untyped_storage().nbytes()",
        *_seen("test_eager.py::test_one_plan_a_kind[{}]"),
    ),
    # what the host hands to the driver
    Mutant(
        "compiled: views where their storage begins", COMPILED,
        "_scalars: addresses[where.buffer] + where.start", "_scalars: addresses[where.buffer]", *SLICES_OF_A_PLAN,
    ),
    Mutant(
        "compiled: inputs where their storage begins", PLAN,
        "0 if t is None else t.data_ptr()", "0 if t is None else t.untyped_storage().data_ptr()", *SLICES_OF_A_PLAN,
    ),
    Mutant(
        "compiled: descriptors of what was recorded", COMPILED,
        "_moved(descriptor, addresses[where.buffer] + where.start)", "descriptor",
        *_seen("test_plan.py::test_repeats_for_other_tensors[{}]"),
    ),
    Mutant(
        "compiled: one program, as when it was compiled", COMPILED,
        "_Observed(compiled, launcher)[(programs, 1, 1)]", "_Observed(compiled, launcher)[(1, 1, 1)]",
        *_seen("test_plan.py::test_repeats_for_other_tensors[{}]"),
    ),
    Mutant(
        "compiled: the number that was recorded", PLACES,
        "lambda _buffers, scalars: scalars[index]", "lambda _buffers, scalars: float(arg)", *CALL,
    ),
    Mutant(
        "compiled: the numbers of the first call", PLAN,
        "key = (stream, *scalars, *addresses)", "key = (stream, *addresses)", *CALL,
    ),
    Mutant(
        "compiled: the addresses of the first call", PLAN,
        "key = (stream, *scalars, *addresses)", "key = (stream, *scalars)", *CALL,
    ),
    Mutant(
        "compiled: the stream of the first call", PLAN,
        "key = (stream, *scalars, *addresses)", "key = (*scalars, *addresses)", *STREAM,
    ),
    Mutant(
        "compiled: the default stream", COMPILED,
        "self._collect(*args, stream=stream))", "self._collect(*args, stream=0))", *STREAM,
    ),
    # what is asynchronous
    Mutant(
        "compiled: statistics read before the launch ahead has ended", NORM,
        "    pdl_wait(USE_PDL)\n    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)\n"
        "    mean = load_channels(running_mean_ptr, channel, C, 0.0)\n",
        "    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)\n"
        "    mean = load_channels(running_mean_ptr, channel, C, 0.0)\n    pdl_wait(USE_PDL)\n",
        *_machine(
            "launches.py::test_launches_that_may_overlap_wait_before_they_touch_memory",
            "test_bounds.py::test_a_norm_writes_nothing_beyond[cpu-float32]",
        ),
    ),
    Mutant(
        "compiled: z read back behind its store", CONV,
        "y = round_as(y, x_desc)\n"
        "            _store(z_out, y, n, h + row, w, c, channel, N, H, W, C_OUT, BOX, BLOCK_C)",
        "_store(z_out, y, n, h + row, w, c, channel, N, H, W, C_OUT, BOX, BLOCK_C)\n"
        "            y = load_addend(z_out, n, h + row, w, c, BOX, BLOCK_C)",
        *_machine("late.py::test_inference_that_saves_z", SAVED_Z.format("cpu-float32")),
    ),
    Mutant(
        "compiled: dx read back behind its store", CONV,
        "= _upstream_sums(dy, z,", "= _upstream_sums(load_addend(out, n, h + row, w, c, BOX, BLOCK_C), z,",
        *_machine(
            "late.py::test_gradient_beside_the_sums_of_the_layer_upstream",
            "test_upstream.py::test_integers_bit_for_bit[cpu-float32-one box-1x1]",
        ),
    ),
    Mutant(
        "compiled: a total in memory, read by the pipeline ahead of its store", NORM,
        "    for first in tl.range(0, splits, BLOCK_S):\n"
        "        split = first + tl.arange(0, BLOCK_S)\n"
        "        offset = (2 * split + which)[:, None] * STRIDE + channel[None, :]\n"
        "        mask = (split < splits)[:, None] & is_channel[None, :]\n"
        "        total += tl.sum(tl.load(partial_ptr + offset, mask=mask, other=0.0), 0)\n",
        "    out = tl.where(which == 0, dbeta_ptr, dgamma_ptr) + channel\n"
        "    tl.store(out, total, mask=is_channel)\n"
        "    for first in tl.range(0, splits, BLOCK_S, num_stages=3):\n"
        "        split = first + tl.arange(0, BLOCK_S)\n"
        "        offset = (2 * split + which)[:, None] * STRIDE + channel[None, :]\n"
        "        mask = (split < splits)[:, None] & is_channel[None, :]\n"
        "        total = tl.sum(tl.load(partial_ptr + offset, mask=mask, other=0.0), 0)\n"
        "        total += tl.load(out, mask=is_channel)\n"
        "        tl.store(out, total, mask=is_channel)\n",
        *_on_fp32("test_batchnorm.py::test_sum_of_many_splits[1100-{}]"),
    ),
]  # fmt: skip
