"""The suites: their arithmetic against figures from elsewhere, their gate against broken kernels."""

import pytest
import torch

from bench.cases import kernels, layers, models
from bench.cases.selection import Selection, named_shape
from bench.measure import timing
from bench.measure.gate import verdict
from bench.measure.launches import launches
from bench.measure.roofline import kernel_passes, layer_passes
from bench.measure.runner import Runner
from bench.schema import IMPLS
from rir_kernels.backends import aten, plans
from rir_kernels.dispatch import plan_cache
from rir_kernels.equivalence import EquivalenceRow
from rir_kernels.triton.launch import conv as conv_launcher
from rir_kernels.triton.plan import plan
from rir_kernels.triton.shapes import SHAPE_TABLE, Shape

CPU = torch.device("cpu")
ONCE = timing.Settings(rounds=1, sample_ms=0.0, warmup=0)
CEILINGS = {"copy_gbps": 4300.0, "matmul_tflops": {"bf16": 790.0, "fp32": 790.0}}


# the floors that bench/NOTES.md computes by hand, in microseconds: (inference, training forward, backward)
@pytest.mark.parametrize(
    ("name", "floors"),
    [("96@32", (55, 78, 169)), ("384@8", (55, 61, 125)), ("16@32", (3.9, 7.8, 17.6)), ("64@56", (75, 123, 269))],
)
def test_floors(name, floors):
    passes = layer_passes([named_shape(name)], 2)
    found = [sum(p.floor_ms(CEILINGS, "bf16") for p in passes[mode]) * 1e3 for mode in ("eval", "train_fwd", "bwd")]
    # the table is rounded to what it shows, and leaves the weights' bytes out
    assert found == pytest.approx(floors, rel=0.02)
    assert sum(p.floor_ms(CEILINGS, "bf16") for p in passes["step"]) * 1e3 == pytest.approx(sum(found[1:]))


def test_backward_is_nine_passes_over_an_activation():
    shape = Shape(64, 64, 8)
    u, weight = shape.batch * 64 * 64 * 2, 9 * 64 * 64 * 2
    passes = layer_passes([shape], 2)
    assert sum(p.bytes for p in passes["train_fwd"]) == 4 * u + weight
    assert sum(p.bytes for p in passes["bwd"]) == 9 * u + 2 * weight
    # a residual from outside is read once, and its gradient written and added
    with_residual = layer_passes([shape, shape], 2, residual_bytes=u)
    assert sum(p.bytes for p in with_residual["step"]) == 2 * sum(p.bytes for p in passes["step"]) + 3 * u
    reduce, apply, data_grad, _ = with_residual["bwd"][:4]  # of the first layer
    assert (reduce.bytes, apply.bytes, data_grad.bytes) == (2 * u, 3 * u, 3 * u + weight)


def test_stride_two_reads_four_times_what_it_writes():
    passes = kernel_passes(Shape(8, 8, 10, stride=2, kernel=1, batch=1), 2)["conv_eval"]
    assert passes.flops == 2 * 5 * 5 * 8 * 8
    assert passes.bytes == 2 * (10 * 10 * 8 + 5 * 5 * 8 + 8 * 8)


# multiply-adds of one image, in millions, as the literature has them
@pytest.mark.parametrize(("op", "macs"), [("resnet18", 1814), ("resnet50", 4089)])
def test_the_networks_are_the_ones_that_everybody_measures(op, macs):
    (case,) = models.cases(Selection(device_type="cpu", ops=(op,), batches=(2,)))
    assert case.passes["eval"][0].flops / 2 / 2 / 1e6 == pytest.approx(macs, rel=0.001)
    # the gradients of input and weight cost a forward each; the first layer's input needs none
    assert 2.9 < case.passes["step"][0].flops / case.passes["eval"][0].flops < 3.0
    parameters = sum(p.numel() for p in models.OPS[op].make().parameters())
    assert parameters == {"resnet18": 11_689_512, "resnet50": 25_557_032}[op]


def test_which_cases_run_by_default():
    found = layers.cases(Selection(device_type="cuda", dtypes=("bf16",)))
    rir = [(case.shape, case.batch) for case in found if case.op == "rir_layer"]
    assert rir[:11] == [(shape.name, 256) for shape in SHAPE_TABLE]
    assert sorted(rir[11:]) == sorted((s, b) for s in ("96@32", "192@16", "384@8") for b in (1, 32, 128, 512))
    assert {case.op for case in found} == {"rir_layer", "basic_block", "rir_block"}
    assert all(case.impls == IMPLS for case in found)
    with pytest.raises(ValueError, match=r"unknown shape '96@33': did you mean '96@32'\?"):
        layers.cases(Selection(device_type="cuda", shapes=("96@33",)))


def run(case, impls, settings=ONCE):
    return list(Runner(CPU, settings, CEILINGS, impls).run(case))


def layer_case(op="rir_layer"):
    (case,) = layers.cases(Selection(device_type="cpu", ops=(op,), shapes=("16@32",), batches=(2,)))
    return case


@pytest.fixture
def clock(monkeypatch):
    """clock(ms, ms, ...): what the calls of each mode take, one mode after the other; five samples around it."""

    def set_clock(*milliseconds):
        left = iter(milliseconds)

        def measure(calls, device, settings):
            middle = next(left)
            for call in calls.values():
                call()
            return {name: [timing.Timing(samples=[middle + d / 10 for d in (0, -2, 1, 2, -1)])] for name in calls}

        monkeypatch.setattr(timing, "measure", measure)

    return set_clock


def test_rows_of_a_case(clock):
    clock(1.0, 2.0, 6.0)
    rows = run(layer_case(), ("reference", "merged", "torch", "auto"))
    assert [row.mode for row in rows if row.impl == "torch"] == ["eval", "train_fwd", "step", "bwd"]
    assert all(row.passed and row.error is None and 0 <= row.budget_used <= 1 for row in rows)
    flops = 2 * 2 * 32 * 32 * 9 * 16 * 16
    medians = {"eval": 1.0, "train_fwd": 2.0, "step": 6.0, "bwd": 4.0}
    work = {"eval": 1, "train_fwd": 1, "step": 3, "bwd": 2}
    for row in rows:
        assert (row.ms_q1, row.ms_median, row.ms_q3) == pytest.approx(
            (medians[row.mode] - 0.1, medians[row.mode], medians[row.mode] + 0.1)
        )
        assert row.tflops == pytest.approx(work[row.mode] * flops / row.ms_median / 1e9)
        assert row.roofline_fraction == pytest.approx(row.floor_ms / row.ms_median)
        assert row.images_per_s == pytest.approx(2 / row.ms_median * 1e3)
        assert ("derived" in row.config) == (row.mode == "bwd")


def test_a_case_says_how_far_it_is(clock):
    clock(1.0, 2.0, 6.0)
    reached = []
    list(Runner(CPU, ONCE, CEILINGS, ("merged", "torch")).run(layer_case(), lambda *step: reached.append(step)))
    checks = ["checking merged", "checking torch"]
    steps = [*checks, "timing eval", *checks, "timing train_fwd", "timing step"]
    assert reached == [(index / 7, what) for index, what in enumerate(steps)]


def test_a_backward_pass_below_the_noise_has_no_time(clock):
    clock(1.0, 2.0, 1.9)
    (row,) = (row for row in run(layer_case(), ("torch",)) if row.mode == "bwd")
    assert row.ms_median is None and row.error.startswith("too noisy")


def broken(fault):
    whole = aten.conv_bn_act

    def conv_bn_act(x, weight, *args, residuals, spec, training, **options):
        if fault == "a tap is skipped":
            weight = weight.clone()
            weight[:, :, 0, 0] = 0
        y = whole(x, weight, *args, residuals=residuals, spec=spec, training=training, **options)
        if fault == "one value is wrong":
            y = y.clone()
            y[0, 0, 0, 0] += 0.01
        return y * 1.00001 if fault == "a gradient is off" and training else y

    return conv_bn_act


def test_the_worst_tensor_speaks():
    def tensor(name, error, budget):
        return EquivalenceRow("output", name, (1,), "float32", error, error, 0.0, budget, None, error <= budget)

    fine = verdict([tensor("a", 0.1, 1.0), tensor("b", 0.4, 0.5), tensor("c", 0.2, 1.0)])
    assert fine.passed and fine.budget_used == pytest.approx(0.8) and fine.error is None
    wrong = verdict([tensor("a", 0.9, 1.0), tensor("b", 3.0, 2.0), tensor("c", 9.0, 1.0)])
    assert not wrong.passed and wrong.budget_used == 9.0
    assert wrong.error == "gate: 2 of 3 tensors beyond their error budgets; output c: error 9.00e+00, budget 1.00e+00"
    assert not verdict([tensor("a", float("nan"), 1.0)]).passed


@pytest.mark.parametrize("fault", ["a tap is skipped", "one value is wrong", "a gradient is off"])
def test_the_gate_refuses_what_is_wrong(fault, monkeypatch):
    monkeypatch.setattr(aten, "conv_bn_act", broken(fault))
    rows = run(layer_case(), ("reference", "torch"))
    assert all(row.passed for row in rows if row.impl == "reference")
    refused = [row for row in rows if row.impl == "torch" and not row.passed]
    assert {row.mode for row in refused} >= {"train_fwd", "step"}
    for row in refused:
        assert row.error.startswith("gate:") and "beyond their error budgets" in row.error
        assert row.ms_median is None and row.samples == []


KERNELS = {
    "conv_eval": {"_conv_fwd_kernel"}, "conv_train": {"_conv_fwd_kernel"}, "finalize": {"_bn_finalize_fwd_kernel"},
    "normalize": {"_bn_apply_fwd_kernel"}, "reduce": {"_bn_reduce_bwd_kernel"}, "apply": {"_bn_apply_bwd_kernel"},
    "data_grad": {"_conv_fwd_kernel"}, "weight_grad": {"_conv_bwd_weight_kernel"},
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("op", kernels.OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernels_pass_their_gate(op, dtype):
    for shape in (Shape(16, 16, 6, batch=2), Shape(6, 10, 7, stride=2, batch=3), Shape(8, 16, 5, 1, 2, batch=2)):
        variant = kernels.set_up(op, shape, dtype, CPU)("triton", True)
        verdict = variant.check()
        assert verdict.passed, (shape, verdict)
        strided = op == "data_grad" and shape.stride == 2
        expected = {"_conv_bwd_data_kernel"} if strided else KERNELS[op]
        assert expected <= {launch["kernel"] for launch in variant.config["launches"]}
        assert all(launch["programs"] >= 1 for launch in variant.config["launches"])
        tiles = [launch for launch in variant.config["launches"] if launch["kernel"] == "_conv_fwd_kernel"]
        assert all(
            tile.keys() >= {"BOX", "BLOCK_C", "BLOCK_K", "C_BLOCKS", "ROWS", "SKIP_PADDING", "FOLD_2X2"}
            for tile in tiles
        )


@pytest.mark.interpreter
@pytest.mark.parametrize("fault", ["the identity is forgotten", "the residual's gradient is lost"])
def test_a_broken_kernel_is_refused(fault, monkeypatch):
    def without_shortcut(launch):
        return lambda *args, spec, **options: launch(*args, spec=spec.__class__(spec.stride, spec.padding), **options)

    name, op = {
        "the identity is forgotten": ("conv_train", "conv_train"),
        "the residual's gradient is lost": ("conv_data_grad", "data_grad"),
    }[fault]
    monkeypatch.setattr(conv_launcher, name, without_shortcut(getattr(conv_launcher, name)))
    shape = Shape(16, 16, 6, batch=2)
    assert not kernels.set_up(op, shape, torch.float32, CPU)("triton", True).check().passed
    build = layers.set_up("rir_layer", shape, torch.float32, CPU)
    assert not build("triton", True).check().passed
    assert build("triton", False).check().passed  # inference goes another way, and is right


@pytest.mark.interpreter
@pytest.mark.parametrize("op", layers.OPS)
def test_layers_of_ours_pass_in_the_interpreter(op):
    build = layers.set_up(op, Shape(8, 8, 6, batch=2), torch.float32, CPU)
    for training in (False, True):
        for impl in ("triton", "hybrid", "torch", "merged"):
            verdict = build(impl, training).check()
            assert verdict.passed, (impl, training, verdict)


@pytest.mark.interpreter
@pytest.mark.parametrize(("training", "mode"), [(False, "eval"), (True, "step")])
def test_the_gate_judges_the_very_plans_that_are_timed(training, mode, monkeypatch):
    """The check leaves plans, forward's and backward's; what is timed runs these and records no other."""
    monkeypatch.setattr(plan_cache, "_planned", plans.Kinds())
    ran, recorded = [], []
    run, record = plan.Plan.__call__, plan.record
    monkeypatch.setattr(plan.Plan, "__call__", lambda self, *args: ran.append(self) or run(self, *args))
    monkeypatch.setattr(plan, "record", lambda *args: recorded.append(1) or record(*args))
    variant = layers.set_up("rir_layer", Shape(8, 8, 6, batch=2), torch.float32, CPU)("triton", training)
    assert variant.check().passed
    judged = ran.copy()
    assert len(judged) == len(recorded) == 1 + training
    with launches() as seen:
        variant.calls[mode]()
    assert ran[len(judged) :] == judged and len(recorded) == len(judged)
    assert seen == variant.config["launches"] and len(seen) >= len(judged)
