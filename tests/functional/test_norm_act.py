"""functional.norm_act on plain PyTorch against the formula in fp64: numbers, autocast, dispatch and errors."""

import functools

import pytest
import torch
import torch.nn.functional as F

import rir_kernels as rir
from rir_kernels.common import switches
from rir_kernels.common.call import Call
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.dispatch import choose, operation
from tests.support.helpers import assert_within_budget, make_norm_call, norm_formula, output_gradient, run
from tests.support.refusals import refused

norm_act = rir.functional.norm_act
impls = pytest.mark.parametrize("impl", ["torch", "reference"])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

CASES = {
    "plain": {},
    "no activation, other eps": {"activation": None, "eps": 0.3},
    "no affine": {"affine": "none"},
    "post_norm, two, scaled": {"residuals": (6, 2), "branch_scale": 0.3},
    "pre_norm, two, scaled": {"residuals": (2, 6), "branch_scale": -2.0, "residual_at": "pre_norm"},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@cases
@impls
@modes
def test_against_the_formula(case, impl, training):
    tensors, options = make_norm_call(6, **case, training=training, momentum=0.3)
    dy = output_gradient(tensors, options, margin=1e-9, function=norm_formula)
    golden = run(norm_formula, tensors, options, dy)
    found = run(functools.partial(norm_act, impl=impl), tensors, options, dy)
    for name, expected in golden.items():
        # sums of some hundred fp64 terms of order one
        torch.testing.assert_close(found[name], expected, rtol=1e-11, atol=1e-11)


@cases
@impls
@modes
def test_bf16_is_within_twice_torchs_error(case, impl, training):
    tensors, options = make_norm_call(
        6, **case, dtype=torch.bfloat16, norm_dtype=torch.float32, training=training, momentum=0.3
    )
    dy = output_gradient(tensors, options, margin=0.1, function=norm_formula)
    golden = run(norm_formula, tensors, options, dy, torch.float64)
    torchs = run(lambda x, *args, **rest: rir.reference.conv_bn_act(x, None, *args, **rest), tensors, options, dy)
    assert_within_budget(
        run(functools.partial(norm_act, impl=impl), tensors, options, dy), torchs, golden, torch.bfloat16
    )


@impls
@modes
@pytest.mark.parametrize("residual_at", ["pre_norm", "post_norm"])
def test_gradcheck_twice(impl, training, residual_at):
    tensors, options = make_norm_call(
        3, batch=2, size=(4, 3), residuals=(3, 2), training=training, residual_at=residual_at, branch_scale=0.5,
        activation=None,
    )  # fmt: skip
    buffers = {name: tensors.pop(name) for name in ("running_mean", "running_var")}

    def function(x, bn_weight, bn_bias, *residual):
        statistics = {name: buffer.clone() for name, buffer in buffers.items()}
        return norm_act(x, bn_weight=bn_weight, bn_bias=bn_bias, residual=residual, impl=impl, **statistics, **options)

    inputs = tuple(t.requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("impl", ["torch", "reference", pytest.param("triton", marks=pytest.mark.interpreter)])
@modes
@pytest.mark.parametrize("residual_at", ["pre_norm", "post_norm"])
def test_an_empty_batch_is_torchs(impl, training, residual_at):
    tensors, options = make_norm_call(
        6, batch=0, residuals=(2,), training=training, residual_at=residual_at, dtype=torch.float32
    )
    found = run(functools.partial(norm_act, impl=impl), tensors, options, dy=torch.zeros(0, 6, 7, 6))
    assert found["y"].shape == (0, 6, 7, 6)
    for name, tensor in tensors.items():
        kept = name.startswith("running")
        assert torch.equal(found[name if kept else f"d{name}"], tensor if kept else torch.zeros_like(tensor)), name


# autocast


IN_AUTOCAST = [(impl, dtype) for impl in ("torch", "reference") for dtype in (torch.float32, torch.bfloat16)]
IN_AUTOCAST += [
    pytest.param("triton", dtype, marks=pytest.mark.interpreter) for dtype in (torch.float32, torch.float16)
]


@pytest.mark.parametrize("impl, dtype", IN_AUTOCAST)
@modes
def test_autocast_leaves_x_alone_as_for_torchs_norm(impl, dtype, training):
    """Its dtype decides, and that of the output and of the gradient is the same."""
    tensors, options = make_norm_call(6, dtype=dtype, norm_dtype=torch.float32, training=training)
    x, buffers = tensors["x"].requires_grad_(), [tensors["running_mean"].clone(), tensors["running_var"].clone()]
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_act(**tensors, **options, impl=impl)
        expected = F.relu(F.batch_norm(x, *buffers, tensors["bn_weight"], tensors["bn_bias"], training))
    assert y.dtype == expected.dtype == dtype
    (ours,), (torchs,) = (torch.autograd.grad(result.float().square().sum(), x) for result in (y, expected))
    assert ours.dtype == torchs.dtype == dtype
    for found, golden in ((y, expected), (ours, torchs)):
        atol = 8 * torch.finfo(dtype).eps * golden.abs().max().item()  # a few roundings in each
        torch.testing.assert_close(found, golden, rtol=0, atol=atol)


@impls
def test_within_autocast_a_residual_takes_the_dtype_of_x(impl):
    tensors, options = make_norm_call(6, dtype=torch.float32, training=True)
    residual = torch.randn(3, 6, 7, 6).bfloat16()
    expected = norm_act(**tensors, **options, residual=residual.float(), impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm_act(**tensors, **options, residual=residual, impl=impl), expected)


# which implementation


def test_auto(monkeypatch):
    """On a GPU our kernels, in fp32 without TF32 too; elsewhere, and in fp64, torch's operators."""
    monkeypatch.setattr(choose, "_missing_on", lambda index: "")
    monkeypatch.setattr(switches, "tf32_allowed", lambda: False)

    class Pretended:
        def __init__(self, device, dtype):
            self.device, self.dtype, self.shape = torch.device(device), dtype, (2, 8, 4, 4)

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for impl in ("auto", "triton", "hybrid"):
            assert choose.resolve(impl, Pretended("cuda:0", dtype), None, ConvBNActSpec(), True) == "triton"
    for where in (("cuda:0", torch.float64), ("cpu", torch.float32)):
        assert choose.resolve("auto", Pretended(*where), None, ConvBNActSpec()) == "torch"


# errors


def _refused(error, *fragments, **change):
    tensors, options = make_norm_call(6, dtype=torch.float32, residuals=(4,), training=True)
    arguments = tensors | {"residual": tensors.pop("residual0")} | options | change
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    with refused(error, *fragments, leaves_alone=tensors):
        norm_act(**arguments)


def test_what_is_refused():
    x = torch.randn(3, 6, 7, 6)
    _refused(ValueError, "x must have four dimensions", "(3, 6, 7)", x=x[..., 0])
    _refused(ValueError, "x must have no empty dimension", x=x[:, :, :0])
    _refused(TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64", x=x.long())
    _refused(TypeError, "x, residual must share a dtype outside autocast", x=x.double())
    _refused(TypeError, "x must be a torch.Tensor, got NoneType", x=None)
    _refused(TypeError, "bn_bias must be torch.float32 beside x", bn_bias=torch.zeros(6).double())
    _refused(RuntimeError, "all tensors must be on one device", "x meta", x=x.to("meta"))
    for name in ("bn_weight", "bn_bias", "running_mean", "running_var"):
        _refused(ValueError, f"{name} must have the shape (6,), one value per", "got (5,)", **{name: torch.ones(5)})
    _refused(ValueError, "residual must have the shape (3, C_res, 7, 6)", residual=x[:, :, :3])
    _refused(ValueError, "a tuple of at most two, got 3", residual=(x, x, x))
    _refused(ValueError, "Expected more than 1 value per channel when training", x=x[:1, :, :1, :1], residual=None)
    _refused(ValueError, "must either both be None or neither", running_mean=None)
    _refused(RuntimeError, "running_var must be defined in evaluation mode", running_var=None, training=False)
    _refused(ValueError, "activation must be", activation="gelu")
    _refused(ValueError, "branch_scale must be", branch_scale=float("nan"))
    _refused(ValueError, "impl must be one of", impl="cuda")


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_kernels_refuse_fp64(impl):
    tensors, options = make_norm_call(6)
    with refused(TypeError, f'impl="{impl}" takes float16, bfloat16 and float32', leaves_alone=list(tensors.values())):
        norm_act(**tensors, **options, impl=impl)


@pytest.mark.parametrize("change", [{"stride": (2, 2)}, {"padding": (1, 1)}, {"groups": 2}, {"shortcut_channels": 2}])
def test_a_spec_with_a_convolutions_options_needs_one(change):
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match="without a weight there is nothing for"):
        spec = ConvBNActSpec(**change)
        operation.apply(Call(x, None, None, None, None, (), None, None, None, spec, True, 0.1), "auto")
