"""functional.conv_bn_act on plain PyTorch ("torch", "reference", "auto" on a CPU) against the formula in fp64."""

import functools
import threading

import pytest
import torch

import rir_kernels as rir
from rir_kernels.dispatch.preference import effective_impl
from tests.support.helpers import assert_within_budget, formula, make_call, output_gradient, run

conv_bn_act = rir.functional.conv_bn_act
IMPLS = ["torch", "reference"]
impls = pytest.mark.parametrize("impl", IMPLS)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# results of order one to a hundred, from sums of at most a few hundred fp64 terms: rounding stays below 1e-12, and a
# mistake is above 1e-3
CLOSE = {"rtol": 1e-11, "atol": 1e-11}

CASES = {
    "plain": {},
    "no activation": {"activation": None, "padding": 1},
    "stride 2": {"stride": 2, "padding": 1},
    "pairs": {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "1x1, stride 2": {"kernel": 1, "stride": 2},
    "7x7": {"kernel": 7, "padding": 3, "stride": 2, "size": (11, 9)},
    "1x3": {"kernel": (1, 3), "padding": (0, 1)},
    "one column": {"size": (7, 1), "padding": 1},
    "one pixel": {"size": (1, 1), "padding": 1, "batch": 5},
    "one channel in": {"channels": (1, 5), "padding": 1},
    "one channel out": {"channels": (5, 1), "padding": 1},
    "primes": {"channels": (7, 13), "padding": 1, "size": (5, 11)},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"channels": (4, 4), "groups": 4, "padding": 1},
    "bias": {"bias": True, "padding": 1},
    "other eps": {"eps": 0.3, "padding": 1},
    "no affine": {"affine": "none", "padding": 1},
    "only weight": {"affine": "weight", "padding": 1},
    "only bias": {"affine": "bias", "padding": 1},
    "pre_norm": {"residuals": (6,), "padding": 1},
    "pre_norm, fewer channels, scaled, bias": {"residuals": (2,), "padding": 1, "branch_scale": 0.3, "bias": True},
    "pre_norm, two": {"residuals": (3, 5), "padding": 1, "stride": 2, "branch_scale": -2},
    "post_norm": {"residuals": (6,), "padding": 1, "residual_at": "post_norm"},
    "post_norm, fewer channels, scaled": {
        "residuals": (2,), "padding": 1, "residual_at": "post_norm", "branch_scale": 0.3, "bias": True,
    },
    "post_norm, two": {"residuals": (6, 1), "padding": 1, "residual_at": "post_norm", "activation": None},
    "scale without residual": {"branch_scale": 0.5, "residual_at": "post_norm", "bias": True},
    "scale 0": {"branch_scale": 0, "residuals": (6,), "padding": 1},
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@cases
@impls
@modes
def test_output_gradients_and_statistics_are_the_formulas(case, impl, training):
    tensors, options = make_call(**case, training=training, momentum=0.3)
    dy = output_gradient(tensors, options, margin=1e-9)
    golden = run(formula, tensors, options, dy)
    ours = run(functools.partial(conv_bn_act, impl=impl), tensors, options, dy)
    for name, expected in golden.items():
        torch.testing.assert_close(ours[name], expected, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["pairs", "groups", "only bias", "pre_norm, two", "post_norm, fewer channels, scaled"])
@pytest.mark.parametrize(
    ("dtype", "norm_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@impls
@modes
def test_error_is_within_twice_torchs(name, dtype, norm_dtype, impl, training):
    tensors, options = make_call(**CASES[name], dtype=dtype, norm_dtype=norm_dtype, training=training, momentum=0.3)
    dy = output_gradient(tensors, options, margin=0.1)  # above bf16's errors in values of order one
    golden = run(formula, tensors, options, dy, dtype=torch.float64)
    torchs = run(rir.reference.conv_bn_act, tensors, options, dy)
    ours = run(functools.partial(conv_bn_act, impl=impl), tensors, options, dy)
    assert_within_budget(ours, torchs, golden, dtype)
    for key, result in ours.items():  # each gradient in the dtype of what it belongs to
        assert result.dtype == (dtype if key == "y" else tensors[key.removeprefix("d")].dtype)


@modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norms_tensors_may_each_be_half_or_fp32(dtype, training):
    """torch's own norm wants one dtype for all four: neither mix may fail, or count for more than its rounding."""
    tensors, options = make_call(dtype=dtype, training=training, norm_dtype=dtype)
    golden = run(formula, tensors, options, dtype=torch.float64)
    for wide in (["bn_weight", "running_mean"], ["bn_bias", "running_var"], ["running_mean", "running_var"]):
        mixed = {name: t.float() if name in wide else t for name, t in tensors.items()}
        ours = run(conv_bn_act, mixed, options)
        assert_within_budget(ours, run(rir.reference.conv_bn_act, tensors, options), golden, dtype)
        assert all(ours[name].dtype == mixed[name].dtype for name in ("running_mean", "running_var"))


@impls
def test_without_statistics_training_uses_the_batchs(impl):
    tensors, options = make_call(training=True, statistics=False)
    ours = run(functools.partial(conv_bn_act, impl=impl), tensors, options)
    torch.testing.assert_close(ours["y"], run(formula, tensors, options)["y"], **CLOSE)


@pytest.mark.parametrize("impl", [*IMPLS, pytest.param("triton", marks=pytest.mark.interpreter)])
def test_a_residual_without_channels_adds_nothing(impl):
    tensors, options = make_call(training=True, dtype=torch.float32)
    y = conv_bn_act(**tensors, **options, impl=impl)
    assert torch.equal(
        conv_bn_act(**tensors, **options, impl=impl, residual=torch.zeros(3, 0, 5, 4), residual_at="pre_norm"), y
    )


# differentiability


@impls
@modes
@pytest.mark.parametrize("residual_at", ["pre_norm", "post_norm"])
def test_gradcheck_twice(impl, training, residual_at):
    tensors, options = make_call(
        channels=(2, 3), batch=2, size=(4, 3), stride=2, padding=1, residuals=(2, 3), bias=True, training=training,
        residual_at=residual_at, branch_scale=0.5, activation=None,  # no kink for finite differences to step over
    )  # fmt: skip
    buffers = {name: tensors.pop(name) for name in ("running_mean", "running_var")}
    x, weight, bn_weight, bn_bias, bias, *residual = (t.requires_grad_() for t in tensors.values())

    def function(x, weight, bn_weight, bn_bias, bias, *residual):
        statistics = {name: buffer.clone() for name, buffer in buffers.items()}
        return conv_bn_act(
            x,
            weight,
            bn_weight=bn_weight,
            bn_bias=bn_bias,
            bias=bias,
            residual=residual,
            impl=impl,
            **statistics,
            **options,
        )

    inputs = (x, weight, bn_weight, bn_bias, bias, *residual)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_statistics_may_change_between_forward_and_backward(training):
    """As DDP does it, which rewrites buffers before each of two forwards. torch's own batch_norm refuses."""
    tensors, options = make_call(training=training, padding=1)
    dy = output_gradient(tensors, options, margin=1e-9)
    golden = run(formula, tensors, options, dy)
    x = tensors.pop("x").requires_grad_()
    y = conv_bn_act(x, **tensors, **options)
    tensors["running_mean"].fill_(7)
    tensors["running_var"].fill_(7)
    (grad,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(grad, golden["dx"], **CLOSE)


def test_inputs_are_left_alone():
    tensors, options = make_call(training=True, residuals=(6, 2), padding=1, bias=True, branch_scale=0.5)
    before = {name: t.clone() for name, t in tensors.items()}
    run_on_the_very_tensors = {name: t for name, t in tensors.items() if not name.startswith("residual")}
    conv_bn_act(**run_on_the_very_tensors, residual=(tensors["residual0"], tensors["residual1"]), **options)
    for name, t in tensors.items():
        assert torch.equal(t, before[name]) != name.startswith("running"), name


# use_impl


def test_use_impl_replaces_auto_alone():
    tensors, options = make_call(training=True)
    with rir.record_calls() as calls, rir.use_impl("reference"):
        conv_bn_act(**tensors, **options)
        conv_bn_act(**tensors, **options, impl="torch")
        with rir.use_impl("torch"):
            conv_bn_act(**tensors, **options)
        with rir.use_impl("auto"):
            conv_bn_act(**tensors, **options)
        conv_bn_act(**tensors, **options)
    with rir.record_calls() as after:
        conv_bn_act(**tensors, **options)
    assert [call.impl for call in calls + after] == ["reference", "torch", "torch", "torch", "reference", "torch"]


def test_use_impl_is_per_thread():
    seen = {}
    entered, leave = threading.Event(), threading.Event()

    def other():
        seen["other"] = effective_impl("auto")
        with rir.use_impl("torch"):
            entered.set()
            leave.wait(10)

    with rir.use_impl("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        seen["here"] = effective_impl("auto")
        leave.set()
        thread.join()
    assert seen == {"other": "auto", "here": "reference"}
