"""Bad inputs: the error's class, what it says, and that nothing has changed when it comes.

Here implementations, devices, dtypes, types and options; shapes and statistics are in test_error_shapes.py. The number
in a test's name is that of the fault in docs/faults.md: 1 no device for the kernels, 2 and 3 devices, 4 and 5 dtypes.
"""

import math

import pytest
import torch

import rir_kernels as rir
from rir_kernels import reference
from tests.helpers import make_call
from tests.refusals import call_arguments, call_refused, module_refused, refused

conv_bn_act = rir.functional.conv_bn_act


@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_row_01_kernels_without_a_device(impl, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    call_refused(RuntimeError, f'impl="{impl}" needs a CUDA device, got x on cpu', "TRITON_INTERPRET=1", impl=impl)


def test_row_01_auto_on_a_cpu():
    arguments = call_arguments()
    expected = conv_bn_act(**call_arguments(), impl="torch")
    assert torch.equal(conv_bn_act(**arguments), expected)


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


def test_row_02_devices():
    for name in ("x", "weight", "bias", "residual", "bn_weight", "bn_bias", "running_mean", "running_var"):
        there = call_arguments()[name].to("meta")
        other = "x cpu" if name != "x" else "weight cpu"
        call_refused(RuntimeError, "all tensors must be on one device", f"{name} meta", other, **{name: there})
    x = torch.randn(2, 4, 5, 5)
    for shortcut in ("pad", "projection"):
        layer = rir.RiRLayer(4, 6, shortcut=shortcut)
        module_refused(layer, RuntimeError, "on one device", "x meta", "weight cpu", inputs=[x.to("meta")])
        module_refused(layer, RuntimeError, "on one device", "r cpu", "t meta", inputs=[x[:, :2], x[:, 2:].to("meta")])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("impl", ["auto", "triton", "hybrid"])
def test_row_03_a_device_that_is_not_the_current_one(impl):
    arguments = {n: t.to("cuda:1") if isinstance(t, torch.Tensor) else t for n, t in call_arguments().items()}
    expected = conv_bn_act(**call_arguments())
    with torch.cuda.device(0):
        y = conv_bn_act(**arguments, impl=impl)
        assert torch.cuda.current_device() == 0
    # fp32 or TF32 products of numbers of order one
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_row_04_dtypes_that_are_not_computed_in(dtype):
    arguments = call_arguments()
    cast = {name: arguments[name].to(dtype) for name in ("x", "weight", "bias", "residual")}
    message = "must be float16, bfloat16, float32 or float64, got"
    call_refused(TypeError, f"x {message} {dtype}", **cast)
    call_refused(TypeError, f"x {message} {dtype}", x=cast["x"])
    x = torch.ones(2, 4, 5, 5).to(dtype)
    for shortcut in ("pad", "projection"):
        module_refused(rir.RiRLayer(4, 6, shortcut=shortcut), TypeError, f"x {message} {dtype}", inputs=[x])
        with torch.autocast("cpu", torch.bfloat16):  # which casts floats alone
            module_refused(rir.RiRLayer(4, 6, shortcut=shortcut), TypeError, f"x {message} {dtype}", inputs=[x])
    module_refused(rir.RiRLayer(4, 6), TypeError, f"r {message} {dtype}", inputs=[x[:, :2], x[:, 2:]])


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_row_05_unlike_dtypes(name, dtype):
    there = call_arguments()[name].to(dtype)
    call_refused(TypeError, "must share a dtype outside autocast", f"{name} {dtype}", "torch.float32", **{name: there})


def test_row_05_streams_and_modules():
    r, t = torch.randn(2, 2, 5, 5), torch.randn(2, 2, 5, 5)
    for layer in (rir.RiRLayer(4, 6), rir.RiRBlock(4, 6)):
        inputs = [r, t.half()]  # torch.cat would make fp32 of it, silently
        module_refused(layer, TypeError, "r, t must share a dtype", "t torch.float16", inputs=inputs)
        module_refused(layer, TypeError, "x, weight must share a dtype", inputs=[r.half(), t.half()])
    projecting = rir.RiRBlock(4, 6, shortcut="projection")
    module_refused(projecting, TypeError, "x, weight must share a dtype", inputs=[torch.cat([r, t], 1).double()])
    unit = rir.ConvBNAct(4, 6, 3)
    inputs = [torch.cat([r, t], 1), torch.randn(2, 6, 5, 5).half()]
    module_refused(unit, TypeError, "must share a dtype", "residual torch.float16", inputs=inputs)


@pytest.mark.parametrize("name", ["bn_weight", "bn_bias", "running_mean", "running_var"])
def test_row_05_dtypes_of_the_norm(name):
    there = call_arguments()[name]
    message = f"{name} must be torch.float32 beside x in torch.float32, got"
    call_refused(TypeError, f"{message} torch.float64", **{name: there.double()})
    call_refused(TypeError, f"{message} torch.float16", **{name: there.half()})
    half = {n: call_arguments()[n].half() for n in ("x", "weight", "bias", "residual")}
    conv_bn_act(**call_arguments(**half))  # fp32 beside half is what mixed precision is
    call_refused(TypeError, "torch.float16 or torch.float32", "got torch.bfloat16", **half, **{name: there.bfloat16()})


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
        ("residual_at", "after"), ("residual_at", None), ("activation", "gelu"), ("activation", "ReLU"),
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
