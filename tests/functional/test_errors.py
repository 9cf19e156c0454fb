"""Bad inputs: the error's class, what it says, and that nothing has changed when it comes.

Implementations, types and options; the kinds of bad input that docs/faults.md numbers are in negative/.
"""

import inspect
import math

import pytest
import torch

import rir_kernels as rir
from rir_kernels import reference
from tests.support.helpers import make_call
from tests.support.refusals import call_arguments, call_refused, module_refused, refused

conv_bn_act = rir.functional.conv_bn_act


def test_an_unknown_implementation():
    names = "impl must be one of 'auto', 'reference', 'torch', 'hybrid', 'triton', got"
    for impl in ("cuda", None, "Torch", ["torch"], 1):
        call_refused(ValueError, f"{names} {impl!r}", impl=impl)
        with pytest.raises(ValueError, match="impl must be one of"), rir.use_impl(impl):
            pass
    for make in (
        lambda: rir.RiRLayer(4, 6, impl="cuda"),
        lambda: rir.RiRBlock(4, 6, impl="cuda"),
        lambda: rir.ConvBNAct(4, 6, 3, impl="cuda"),
        lambda: rir.RiRLayer.from_reference(reference.RiRLayer(4, 6), impl="cuda"),
    ):
        with pytest.raises(ValueError, match=names):
            make()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("channels", "kernel", "options", "message"),
    [
        ((4, 6), 3, {"groups": 2}, "groups=2"),
        ((4, 6), 3, {"dilation": 2}, "dilation=(2, 2)"),
        ((4, 6), 5, {}, "kernel size (5, 5)"),
        ((4, 6), 3, {"stride": 3}, "stride=(3, 3)"),
    ],
)
def test_what_the_kernels_do_not_do(channels, kernel, options, message):
    tensors, options = make_call(channels=channels, kernel=kernel, dtype=torch.float32, training=True, **options)
    with refused(NotImplementedError, 'impl="triton" has no kernel for', message, leaves_alone=list(tensors.values())):
        conv_bn_act(**tensors, **options, impl="triton")


FUNCTIONS = {
    "conv_bn_act": (rir.functional.conv_bn_act, "(x, weight, bn_weight=..., bn_bias=...)"),
    "reference": (reference.conv_bn_act, "(x, weight, bn_weight=..., bn_bias=...)"),
    "norm_act": (rir.functional.norm_act, "(x, bn_weight=..., bn_bias=..., running_mean=...)"),
}


@pytest.mark.parametrize(("function", "shown"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_belongs_to_the_norm_is_named(function, shown):
    """By position it came in another order than in F.batch_norm."""
    parameters = inspect.signature(function).parameters
    named = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    assert list(parameters) == [*list(parameters)[: len(parameters) - len(named)], *named] and "bn_weight" in named
    tensors = [torch.ones(2, 4, 3, 3), torch.ones(4, 4, 1, 1), torch.ones(4), torch.ones(4)]
    with refused(TypeError, f"write {function.__name__}{shown}", leaves_alone=tensors):
        function(*tensors, training=True)


@pytest.mark.parametrize(("function", "shown"), FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("given", ["residual", "branch_scale"])
def test_where_a_residual_joins_is_said(function, shown, given):
    x, weight = torch.ones(2, 4, 3, 3), torch.ones(4, 4, 1, 1)
    arguments = {"x": x, "training": True} | ({"weight": weight} if "(x, weight" in shown else {})
    function(**arguments)
    value = {"residual": x, "branch_scale": 0.5}[given]
    with refused(TypeError, f"a {given} needs residual_at", '"pre_norm"', '"post_norm"', leaves_alone=[x, weight]):
        function(**arguments, **{given: value})


def test_wrong_types():
    arguments = call_arguments()
    r = arguments["residual"]
    for name in ("x", "weight", "bias", "bn_weight", "running_var"):
        call_refused(TypeError, f"{name} must be a torch.Tensor, got list", **{name: arguments[name].tolist()})
    for name in ("x", "weight"):
        call_refused(TypeError, f"{name} must be a torch.Tensor, got NoneType", **{name: None})
    call_refused(TypeError, "residual must be a torch.Tensor or a tuple of two, got int", residual=3)
    call_refused(TypeError, "residual must be a torch.Tensor or a tuple of two, got ndarray", residual=r.numpy())
    call_refused(TypeError, "residual[1] must be a torch.Tensor, got NoneType", residual=(r, None))
    call_refused(ValueError, "a tuple of at most two, got 3", residual=(r, r, r))
    module_refused(rir.ConvBNAct(4, 6, 3), TypeError, "residual must be", "got str", inputs=[arguments["x"], "x"])
    for module in (rir.RiRLayer(4, 6), rir.RiRLayer(4, 6, shortcut="projection"), rir.RiRBlock(4, 6)):
        for x in (None, [1], 3):
            module_refused(module, TypeError, f"x must be a torch.Tensor, got {type(x).__name__}", inputs=[x])
        module_refused(module, TypeError, "t must be a torch.Tensor, got int", inputs=[torch.zeros(2, 2, 3, 3), 1])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("residual_at", "after"), ("activation", "gelu"), ("activation", "ReLU"),
        ("activation", True), ("branch_scale", math.nan), ("branch_scale", math.inf), ("branch_scale", "1"),
        ("stride", 0), ("stride", (1, 0)), ("stride", (1, 1, 1)), ("stride", 1.0), ("padding", -1),
        ("padding", "same"), ("dilation", 0), ("groups", 0), ("groups", (1, 1)), ("groups", True),
    ],
)  # fmt: skip
def test_unknown_options(option, value):
    call_refused(ValueError, f"{option} must be", f"got {value!r}", **{option: value})


def test_kernels_refuse_fp64():
    double = {n: t.double() for n, t in call_arguments().items() if isinstance(t, torch.Tensor)}
    call_refused(
        TypeError, 'impl="triton" takes float16, bfloat16 and float32, got torch.float64', impl="triton", **double
    )
