"""The whole fused operation through `functional`: outputs, every gradient and the running statistics."""

import dataclasses
import functools

import pytest
import torch

import rir_kernels as rir
from rir_kernels import functional, reference
from rir_kernels.common import activations
from tests.support.helpers import assert_within_budget, formula, make_call, output_gradient, run

from .targets import INTERPRETED_HALF, TARGETS, crossed, ieee_fp32, rand  # noqa: F401 (an autouse fixture)

targets = pytest.mark.parametrize("target", TARGETS)
impls = pytest.mark.parametrize("impl", ["triton", "hybrid"])

CASES = {
    "P1 conv, BN, ReLU": {"channels": (8, 16)},
    "P2 conv, BN": {"channels": (8, 16), "stride": 2, "kernel": 1, "padding": 0, "activation": None},
    "P3 residual after the norm": {"channels": (16, 16), "residuals": (16,), "residual_at": "post_norm"},
    "P4 residual before the norm": {"channels": (16, 16), "residuals": (8,)},
    "P4 stride 2, two residuals": {"channels": (8, 24), "stride": 2, "residuals": (12, 24)},
    "P6 scaled branch": {"channels": (8, 8), "residuals": (8,), "residual_at": "post_norm", "branch_scale": 0.3},
    "scaled before the norm, bias": {"channels": (8, 8), "residuals": (4,), "branch_scale": 0.3, "bias": True},
    "odd channels": {"channels": (5, 9), "stride": 2, "residuals": (7,)},
    "no affine": {"channels": (8, 8), "affine": "none"},
}


def _call(case, target, training):
    device, dtype = target
    case = {"padding": 1, "training": training, **case}
    tensors, options = make_call(dtype=dtype, norm_dtype=torch.float32, **case)
    dy = output_gradient(tensors, options)
    last = torch.channels_last
    tensors = {name: t.to(device, memory_format=last) if t.dim() == 4 else t.to(device) for name, t in tensors.items()}
    return tensors, options, dy


def _fused(impl):
    return functools.partial(functional.conv_bn_act, impl=impl)


@crossed(2, case=CASES)
@impls
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_within_the_budget(case, target, impl, training, poisoned):
    tensors, options, dy = _call(case, target, training)
    golden = run(formula, tensors, options, dy, torch.float64)
    torchs = run(reference.conv_bn_act, tensors, options, dy)
    assert_within_budget(run(_fused(impl), tensors, options, dy), torchs, golden, target[1])


@impls
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_derivative_that_needs_the_sum_after_the_norm(impl, target, training, monkeypatch):
    """No kernel applies the activation, and the results are within the budget: as if y's sign told nothing of ReLU."""
    from rir_kernels.triton.launch import runtime

    monkeypatch.setitem(activations._KINDS, "relu", dataclasses.replace(activations._KINDS["relu"], by_sign=False))
    # channels of no other test: a plan recorded with ReLU would be replayed
    case = {"channels": (8, 40), "residuals": (40,), "residual_at": "post_norm"}
    tensors, options, dy = _call(case, target, training)
    golden = run(formula, tensors, options, dy, torch.float64)
    torchs = run(reference.conv_bn_act, tensors, options, dy)
    seen = []
    with runtime.observed(lambda kernel, programs, options: seen.append(options.get("ACT"))):
        found = run(_fused(impl), tensors, options, dy)
    assert seen and set(seen) == {None}
    assert_within_budget(found, torchs, golden, target[1])


@impls
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_per_channel_vectors_with_gaps(impl, target, training):
    """Every other value of a buffer: the same bits as from dense vectors, gradients and running statistics too."""
    tensors, options, dy = _call({"channels": (8, 8), "bias": True}, target, training)

    def with_gaps(**call):
        gaps = {name: t.repeat_interleave(2)[::2] for name, t in call.items() if getattr(t, "ndim", 0) == 1}
        assert len(gaps) == 5 and {t.stride() for t in gaps.values()} == {(2,)}
        y = _fused(impl)(**call | gaps)
        for name in ("running_mean", "running_var"):
            call[name].copy_(gaps[name])
        return y

    dense, spread = (run(function, tensors, options, dy) for function in (_fused(impl), with_gaps))
    for name in dense:
        # the running statistics by a kernel, or by torch's operators: the order of three roundings may differ
        torch.testing.assert_close(spread[name], dense[name], rtol=4 * 2**-24 if "running" in name else 0, atol=0)


@impls
@targets
def test_inputs_are_left_as_they_were(target, impl):
    tensors, options, _ = _call(CASES["P4 residual before the norm"], target, False)
    before = {name: t.clone() for name, t in tensors.items()}
    residual = tensors.pop("residual0")
    _fused(impl)(**tensors, residual=residual, **options)
    for name, tensor in (tensors | {"residual0": residual}).items():
        assert torch.equal(tensor, before[name]), name


@impls
@pytest.mark.parametrize("target", TARGETS)
def test_same_bits_in_both_memory_formats_and_output_in_the_inputs(impl, target):
    tensors, options, dy = _call(CASES["P4 residual before the norm"], target, True)
    last = run(_fused(impl), tensors, options, dy)
    first = run(_fused(impl), {name: t.contiguous() for name, t in tensors.items()}, options, dy)
    assert last["y"].is_contiguous(memory_format=torch.channels_last)
    assert first["y"].is_contiguous()
    if impl == "triton":  # the vendor may choose another algorithm for another format
        for name in last:
            assert torch.equal(first[name], last[name]), name


@pytest.mark.parametrize(
    "options", [{"groups": 2}, {"dilation": 2}, {"kernel": 7}, {"stride": 3}], ids=lambda o: next(iter(o))
)
def test_what_the_kernels_do_not_do_is_refused_by_name_and_done_by_hybrid(options, device):
    options = dict(options)
    k = options.pop("kernel", 3)
    groups = options.get("groups", 1)
    target = device, torch.float32
    x, weight = rand((2, 8, 9, 9), target, seed=1), rand((8, 8 // groups, k, k), target, seed=2)
    kwargs = {"padding": k // 2, "training": True, **options}
    with pytest.raises(NotImplementedError, match="has no kernel for"):
        _fused("triton")(x, weight, **kwargs)
    tensors = {"x": x, "weight": weight}
    golden = run(formula, tensors, kwargs, dtype=torch.float64)
    assert_within_budget(
        run(_fused("hybrid"), tensors, kwargs), run(reference.conv_bn_act, tensors, kwargs), golden, x.dtype
    )


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("stride", [1, 2])
@targets
@impls
def test_rir_layer_against_its_four_convolutions(target, impl, stride, shortcut):
    """The identity inside the kernels, forward and backward; `compare` brings the budget."""
    device, dtype = target
    torch.manual_seed(0)
    layer = rir.RiRLayer(8, 12, stride=stride, shortcut=shortcut, impl=impl, device=device, dtype=dtype)
    report = rir.compare(layer.to_reference(), layer, rand((3, 8, 6, 5), target, seed=1))
    assert report.passed, report


@pytest.mark.parametrize("target", [TARGETS[0], INTERPRETED_HALF, *TARGETS[2:]])  # fp32 has nothing to round
def test_inference_with_a_gradient_normalizes_the_z_that_it_saves(target):
    """Backward takes the ReLU's mask from the stored z: y must be its function, not the accumulator's.

    With mean 0, variance + eps 1 and no affine parameters y is relu(z) exactly; from the accumulator it would be
    rounded from other digits wherever scale and rounding do not commute, so the branch is scaled by 3.
    """
    from rir_kernels.common.spec import ConvBNActSpec
    from rir_kernels.triton.launch import conv

    x, weight = rand((2, 8, 6, 6), target, seed=1), rand((8, 8, 3, 3), target, seed=2)
    residual = rand((2, 8, 6, 6), target, seed=3)
    statistics = {"mean": torch.zeros(8, device=target[0]), "var": torch.full((8,), 0.5, device=target[0])}
    spec = ConvBNActSpec(padding=(1, 1), eps=0.5, post_norm=True, branch_scale=3.0)
    y, z = conv.conv_infer(
        x, weight, bias=None, residuals=[residual], spec=spec, gamma=None, beta=None, save_z=True, **statistics
    )
    golden = (z.double() * 3 + residual.double()).relu()
    # one rounding to the dtype, and the fp32 roundings of product and sum
    allowed = torch.finfo(target[1]).eps / 2 * golden + 1.2e-7 * (3 * z.double().abs() + residual.double().abs())
    assert ((y.double() - golden).abs() <= allowed).all()
