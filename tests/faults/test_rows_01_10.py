"""Bad inputs and faults, 1 to 10: devices, dtypes, shapes, odd sizes, empty batches.

The number in a test's name is a kind of bad input. A refusal comes before any launch and changes nothing.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import rir_kernels as rir
from rir_kernels import reference
from rir_kernels.functional import norm_act
from tests.kernels.targets import ieee_fp32  # noqa: F401 (an autouse fixture)
from tests.support.forms import (
    by,
    check_call,
    checked_forms,
    forms,
    launches,  # noqa: F401
    make_pair,
    modes,
    moved,
    norms,
    refused_as_unfused,
    ways,
)
from tests.support.helpers import (
    assert_within_budget,
    formula,
    make_call,
    make_norm_call,
    module_results,
    norm_formula,
    output_gradient,
    run,
)
from tests.support.refusals import call_arguments, call_refused, module_refused, refused

conv_bn_act = rir.functional.conv_bn_act


# 1: kernels where none can run


@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_row_01_kernels_without_a_device(impl, monkeypatch):
    """RuntimeError that names the device, by every form."""
    pytest.importorskip("triton")  # imported first: it decides then how its own functions run
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = f'impl="{impl}" needs a CUDA device, got x on cpu', "TRITON_INTERPRET=1"
    call_refused(RuntimeError, *message, impl=impl)
    for form in ("layer", "block", "unit", "fused"):
        module_refused(make_pair(form, impl)[0], RuntimeError, *message, inputs=[torch.randn(2, 4, 5, 5)])


def test_row_01_neither_gpu_nor_interpreter():
    """In a process of its own, where TRITON_INTERPRET was never set."""
    code = """
import torch, rir_kernels as rir
for impl in ("triton", "hybrid"):
    try:
        rir.functional.conv_bn_act(torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3, 3), training=True, impl=impl)
    except RuntimeError as error:
        print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert [line.partition(" on cpu")[0] for line in lines] == [
        f'impl="{impl}" needs a CUDA device, got x' for impl in ("triton", "hybrid")
    ]


@modes
def test_row_01_auto_on_a_cpu(training):
    """The bits of "torch", with every gradient."""
    tensors, options = make_call(dtype=torch.float32, training=training, residuals=(4,), padding=1)
    dy = output_gradient(tensors, options)
    auto, named = (run(by(impl), tensors, options, dy) for impl in ("auto", "torch"))
    for name, expected in named.items():
        assert torch.equal(auto[name], expected), name


# 2 and 3: devices


def test_row_02_devices():
    """RuntimeError that lists the tensors and their devices."""
    for name in ("x", "weight", "bias", "residual", "bn_weight", "bn_bias", "running_mean", "running_var"):
        there = call_arguments()[name].to("meta")
        other = "x cpu" if name != "x" else "weight cpu"
        call_refused(RuntimeError, "all tensors must be on one device", f"{name} meta", other, **{name: there})
    x = torch.randn(2, 4, 5, 5)
    for shortcut in ("pad", "projection"):
        layer = rir.RiRLayer(4, 6, shortcut=shortcut)
        module_refused(layer, RuntimeError, "on one device", "x meta", "weight cpu", inputs=[x.to("meta")])
        module_refused(layer, RuntimeError, "on one device", "r cpu", "t meta", inputs=[x[:, :2], x[:, 2:].to("meta")])


@checked_forms
def test_row_02_devices_by_form(form):
    """Modules too, the statistics untouched."""
    module, _ = make_pair(form)
    module_refused(module, RuntimeError, "on one device", "x meta", "cpu", inputs=[torch.zeros(2, 4, 5, 5).to("meta")])


def test_row_02_devices_of_a_fused_unit():
    refused_as_unfused(torch.zeros(2, 4, 5, 5).to("meta"))


@pytest.mark.interpreter
def test_row_02_nothing_is_launched(launches):  # noqa: F811
    """Neither in the first call nor after one that left a plan."""
    call_refused(RuntimeError, "on one device", impl="triton", bn_bias=torch.zeros(6, device="meta"))
    assert not launches
    conv_bn_act(**call_arguments(), impl="triton")
    assert launches
    launches.clear()
    call_refused(RuntimeError, "on one device", impl="triton", bn_bias=torch.zeros(6, device="meta"))
    assert not launches


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["torch", "hybrid", "triton"])
def test_row_02_a_counter_of_batches_elsewhere(impl):
    """It may lie anywhere, as torch's norms have it: no kernel is handed its address."""
    layer, twin = (rir.RiRLayer(4, 6, impl=impl) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    layer.bn.num_batches_tracked = layer.bn.num_batches_tracked.to("meta")
    x = torch.randn(2, 4, 5, 5)
    for _ in range(2):
        torch.testing.assert_close(layer(x), twin(x), rtol=0, atol=1e-6)  # one rounding of numbers of order one
    assert layer.bn.num_batches_tracked.is_meta
    torch.testing.assert_close(layer.bn.running_var, twin.bn.running_var, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.real_gpu("tensors on two kinds of device")
def test_row_02_a_counter_on_the_cpu_beside_cuda_norms():
    """It counts."""
    layer = rir.RiRLayer(4, 6, impl="triton").cuda()
    layer.bn.num_batches_tracked = layer.bn.num_batches_tracked.cpu()
    for _ in range(2):
        layer(torch.randn(2, 4, 5, 5, device="cuda"))
    assert layer.bn.num_batches_tracked.item() == 2


@pytest.mark.gpu
@pytest.mark.real_gpu("tensors on two kinds of device")
def test_row_02_a_cpu_tensor_beside_cuda_ones():
    """RuntimeError, whatever the implementation."""
    there = {n: t.to("cuda") if isinstance(t, torch.Tensor) else t for n, t in call_arguments().items()}
    for name in ("x", "weight", "residual", "running_var"):
        mixed = there | {name: call_arguments()[name]}
        for impl in ("auto", "triton", "hybrid", "torch"):
            call_refused(RuntimeError, "on one device", f"{name} cpu", "cuda:0", impl=impl, **mixed)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("impl", ["auto", "triton", "hybrid"])
def test_row_03_a_device_that_is_not_the_current_one(impl):
    """Right numbers there, forward and backward, twice (the second call has a plan); the current device stays."""
    tensors, options = make_call(dtype=torch.float32, residuals=(4,), bias=True, padding=1, training=True)
    dy = output_gradient(tensors, options)
    golden = run(formula, tensors, options, dy)
    for _ in range(2):
        with torch.cuda.device(0):
            ours = run(by(impl), moved(tensors, "cuda:1"), options, dy.to("cuda:1"))
            assert torch.cuda.current_device() == 0
        assert {t.device for t in ours.values()} == {torch.device("cuda:1")}
        for name, expected in golden.items():
            # fp32 products of numbers of order one, in sums of a few dozen
            torch.testing.assert_close(ours[name].cpu(), expected, rtol=1e-3, atol=1e-3)


# 4 and 5: dtypes


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_row_04_dtypes_that_are_not_computed_in(dtype):
    """TypeError that names the dtype; autocast casts floats alone."""
    arguments = call_arguments()
    cast = {name: arguments[name].to(dtype) for name in ("x", "weight", "bias", "residual")}
    message = "must be float16, bfloat16, float32 or float64, got"
    for impl in ("auto", "reference", "torch", "triton"):
        call_refused(TypeError, f"x {message} {dtype}", impl=impl, **cast)
        call_refused(TypeError, f"x {message} {dtype}", impl=impl, x=cast["x"])
    x = torch.ones(2, 4, 5, 5).to(dtype)
    for shortcut in ("pad", "projection"):
        module_refused(rir.RiRLayer(4, 6, shortcut=shortcut), TypeError, f"x {message} {dtype}", inputs=[x])
        with torch.autocast("cpu", torch.bfloat16):
            module_refused(rir.RiRLayer(4, 6, shortcut=shortcut), TypeError, f"x {message} {dtype}", inputs=[x])
    module_refused(rir.RiRLayer(4, 6), TypeError, f"r {message} {dtype}", inputs=[x[:, :2], x[:, 2:]])
    for form in ("block", "unit"):
        module_refused(make_pair(form)[0], TypeError, f"x {message} {dtype}", inputs=[x])
    refused_as_unfused(x)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_row_05_unlike_dtypes(name, dtype):
    """TypeError that lists them."""
    there = call_arguments()[name].to(dtype)
    for impl in ("auto", "triton"):
        call_refused(
            TypeError, "must share a dtype outside autocast", f"{name} {dtype}", "torch.float32",
            impl=impl, **{name: there},
        )  # fmt: skip


def test_row_05_streams_and_modules():
    """TypeError where torch.cat would make fp32 of half, silently."""
    r, t = torch.randn(2, 2, 5, 5), torch.randn(2, 2, 5, 5)
    for layer in (rir.RiRLayer(4, 6), rir.RiRBlock(4, 6)):
        inputs = [r, t.half()]
        module_refused(layer, TypeError, "r, t must share a dtype", "t torch.float16", inputs=inputs)
        module_refused(layer, TypeError, "x, weight must share a dtype", inputs=[r.half(), t.half()])
    projecting = rir.RiRBlock(4, 6, shortcut="projection")
    module_refused(projecting, TypeError, "x, weight must share a dtype", inputs=[torch.cat([r, t], 1).double()])
    unit = rir.ConvBNAct(4, 6, 3)
    inputs = [torch.cat([r, t], 1), torch.randn(2, 6, 5, 5).half()]
    module_refused(unit, TypeError, "must share a dtype", "residual torch.float16", inputs=inputs)
    refused_as_unfused(torch.cat([r, t], 1).half())


@pytest.mark.parametrize("name", ["bn_weight", "bn_bias", "running_mean", "running_var"])
def test_row_05_dtypes_of_the_norm(name):
    """fp32 or x's dtype; TypeError for another."""
    there = call_arguments()[name]
    message = f"{name} must be torch.float32 beside x in torch.float32, got"
    call_refused(TypeError, f"{message} torch.float64", **{name: there.double()})
    call_refused(TypeError, f"{message} torch.float16", **{name: there.half()})
    half = {n: call_arguments()[n].half() for n in ("x", "weight", "bias", "residual")}
    call_refused(TypeError, "torch.float16 or torch.float32", "got torch.bfloat16", **half, **{name: there.bfloat16()})


@ways
@modes
def test_row_05_fp32_norms_beside_half(impl, where, training):
    """Allowed, and right: that is mixed precision. The norm's results stay fp32."""
    tensors, options = make_call(
        dtype=torch.float16, norm_dtype=torch.float32, residuals=(4,), bias=True, padding=1, training=training
    )
    ours = check_call(tensors, options, impl, where, margin=0.05)  # fp16's errors in values of order one
    assert {ours[name].dtype for name in ("dbn_weight", "dbn_bias", "running_mean")} == {torch.float32}
    assert {ours[name].dtype for name in ("y", "dx", "dweight", "dresidual0")} == {torch.float16}


# 6 and 7: shapes


@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("shape", [(), (6,), (4, 7, 6), (1, 3, 4, 7, 6)], ids=str)
def test_row_06_dimensions(name, shape):
    """ValueError with the shape that came."""
    for impl in ("auto", "triton"):
        call_refused(
            ValueError, f"{name} must have four dimensions", str(shape), impl=impl, **{name: torch.zeros(shape)}
        )
    modules = rir.RiRLayer(4, 6), rir.RiRLayer(4, 6, shortcut="projection"), rir.RiRBlock(4, 6), rir.ConvBNAct(4, 6, 3)
    for module in modules:
        module_refused(module, ValueError, "x must have", "(N, ", str(shape), inputs=[torch.zeros(shape)])


@pytest.mark.parametrize("shape", [(), (6,), (4, 7, 6), (1, 3, 4, 7, 6)], ids=str)
def test_row_06_dimensions_of_a_fused_unit(shape):
    refused_as_unfused(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"x": (3, 5, 7, 6)}, ["x has 5 channels", "(6, 4, 3, 3)", "takes 4"]),
        ({"groups": 2}, ["x has 4 channels", "groups=2", "takes 8"]),
        ({"groups": 4}, ["6 output channels", "groups=4"]),
        ({"weight": (0, 4, 3, 3)}, ["weight must have no empty dimension", "(0, 4, 3, 3)"]),
        ({"weight": (6, 4, 0, 3)}, ["weight must have no empty dimension", "(6, 4, 0, 3)"]),
        ({"x": (3, 4, 0, 6)}, ["x must have no empty dimension", "(3, 4, 0, 6)"]),
        ({"x": (3, 4, 7, 6), "dilation": 5}, ["the output would be -1 x -2 pixels", "dilation (5, 5)"]),
        ({"bias": (5,)}, ["bias must have the shape (6,)", "got (5,)"]),
        ({"bias": (6, 1)}, ["bias must have the shape (6,)", "got (6, 1)"]),
        ({"bn_weight": (5,)}, ["bn_weight must have the shape (6,)", "got (5,)"]),
        ({"bn_bias": ()}, ["bn_bias must have the shape (6,)", "got ()"]),
        ({"running_mean": (1, 6)}, ["running_mean must have the shape (6,)", "got (1, 6)"]),
        ({"running_var": (1,)}, ["running_var must have the shape (6,)", "got (1,)"]),
        ({"residual": (3, 7, 7, 6)}, ["residual must have the shape (3, C_res, 7, 6)", "C_res <= 6", "(3, 7, 7, 6)"]),
        ({"residual": (1, 4, 7, 6)}, ["residual must have the shape", "(1, 4, 7, 6)"]),  # no broadcasting
        ({"residual": (3, 4, 1, 1)}, ["residual must have the shape", "(3, 4, 1, 1)"]),
        ({"residual": (4, 7, 6)}, ["residual must have the shape", "(4, 7, 6)"]),
    ],
)
def test_row_07_shapes(change, fragments):
    """ValueError with what came and what was expected."""
    change = {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in change.items()}
    for impl in ("auto", "triton"):
        call_refused(ValueError, *fragments, impl=impl, **change)


@pytest.mark.parametrize("make", [rir.RiRLayer, rir.RiRBlock])
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_row_07_shapes_of_the_streams(make, shortcut):
    """ValueError for streams that do not fit the module, or each other."""
    module, zeros = make(4, 6, shortcut=shortcut), torch.zeros
    module_refused(
        module,
        ValueError,
        "4",
        "got (2, 5, 3, 3)" if make is rir.RiRBlock or shortcut == "projection" else "x has 5 channels",
        inputs=[zeros(2, 5, 3, 3)],
    )
    module_refused(module, ValueError, "r must have", "got (2, 3, 3, 3)", inputs=[zeros(2, 3, 3, 3), zeros(2, 2, 3, 3)])
    module_refused(module, ValueError, "t must have", "got (2, 3, 3, 3)", inputs=[zeros(2, 2, 3, 3), zeros(2, 3, 3, 3)])
    for other in ((1, 2, 3, 3), (2, 2, 3, 4)):
        module_refused(module, ValueError, "r and t must agree", str(other), inputs=[zeros(2, 2, 3, 3), zeros(other)])
    module_refused(module, ValueError, "t must have the shape (N, 2, H, W)", inputs=[zeros(2, 2, 3, 3), None])
    module_refused(module, ValueError, "r and t are both None", inputs=[None, None])


def test_row_07_outer():
    """ValueError for an outer shortcut of another shape."""
    layer, x = rir.RiRLayer(4, 6), torch.randn(2, 4, 5, 5)
    for shape in ((2, 7, 5, 5), (2, 6, 4, 5), (6,)):
        with refused(ValueError, "C_res <= 6", str(shape), leaves_alone=[*layer.parameters(), *layer.buffers()]):
            layer(x, outer=torch.zeros(shape))


def test_row_07_units():
    """ValueError for channels and residuals that do not fit ConvBNAct; torch's for channels of a fused convolution."""
    unit, x = rir.ConvBNAct(4, 6, 3), torch.zeros(2, 4, 3, 3)
    module_refused(unit, ValueError, "C_res <= 6", "got (1, 6, 3, 3)", inputs=[x, torch.zeros(1, 6, 3, 3)])
    module_refused(unit, ValueError, "x has 5 channels", inputs=[torch.zeros(2, 5, 3, 3)])
    refused_as_unfused(torch.zeros(2, 5, 3, 3))


# 8 and 9: sizes that are odd but right


@ways
@pytest.mark.parametrize("channels", [(1, 1), (3, 3), (13, 13), (15, 17), (17, 15), (31, 33)], ids=str)
def test_row_08_channels(channels, impl, where):
    """Within twice torch's error: numbers of channels that no tile divides."""
    tensors, options = make_call(
        channels=channels, kernel=1, batch=2, size=(3, 3), dtype=torch.float32, training=True, residuals=channels[1:]
    )
    check_call(tensors, options, impl, where)


@ways
def test_row_08_more_than_2048_channels(impl, where):
    """Within twice torch's error: into the convolution in evaluation, and through the norm in training."""
    tensors, options = make_call(channels=(2049, 3), kernel=1, batch=1, size=(2, 2), dtype=torch.float32)
    tensors = moved(tensors, where)
    golden = run(formula, tensors, options, dtype=torch.float64)
    torchs = run(reference.conv_bn_act, tensors, options)
    assert_within_budget(run(by(impl), tensors, options), torchs, golden, torch.float32)
    tensors, options = make_norm_call(channels=2049, size=(2, 2), dtype=torch.float32, training=True)
    dy = output_gradient(tensors, options, 1e-3, function=norm_formula)  # fp32's errors in values of order one
    tensors = moved(tensors, where)
    golden = run(norm_formula, tensors, options, dy, dtype=torch.float64)
    torchs = run(by("torch", norm_act), tensors, options, dy)
    assert_within_budget(run(by(impl, norm_act), tensors, options, dy), torchs, golden, torch.float32)


@ways
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 8)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_row_09_sizes(size, memory_format, impl, where):
    """Within twice torch's error, in the format that came."""
    tensors, options = make_call(size=size, batch=4, padding=1, stride=2, dtype=torch.float32, training=True)
    tensors["x"] = torch.empty(tensors["x"].shape, memory_format=memory_format).copy_(tensors["x"])
    ours = check_call(tensors, options, impl, where)
    assert ours["y"].is_contiguous(memory_format=memory_format)


@ways
@pytest.mark.parametrize("kernel", [(1, 3), (3, 1)])
def test_row_09_kernels(kernel, impl, where):
    """Within twice torch's error: kernels of one row or one column, and of other padding along each."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    tensors, options = make_call(kernel=kernel, padding=padding, size=(1, 6), dtype=torch.float32, training=True)
    check_call(tensors, options, impl, where)


@ways
@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (2, 1, 5, 6), (2, 3, 5, 1), (1, 1, 1, 9)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_row_09_strides_that_fit_both_formats(shape, memory_format, impl, where):
    """The output has the strides of torch's own convolution."""
    x = torch.empty(shape, memory_format=memory_format).copy_(torch.randn(shape))
    weight = torch.randn(4, shape[1], 3, 3)
    expected = F.conv2d(x, weight, padding=1).stride()
    assert conv_bn_act(x.to(where), weight.to(where), padding=1, training=True, impl=impl).stride() == expected


# 10: empty batches


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@modes
def test_row_10_an_empty_batch(impl, training, device):
    """An empty output, gradients of zeros, the statistics as they were."""
    if impl != "triton":
        device = "cpu"
    tensors, options = make_call(batch=0, residuals=(2,), bias=True, training=training, dtype=torch.float32)
    tensors = moved(tensors, device)
    ours = run(by(impl), tensors, options, dy=torch.zeros(0, 6, 5, 4))
    assert ours["y"].shape == (0, 6, 5, 4)
    for name in ("running_mean", "running_var"):
        assert torch.equal(ours[name], tensors[name])
    for name, tensor in tensors.items():
        if not name.startswith("running"):
            assert torch.equal(ours[f"d{name}"], torch.zeros_like(tensor)), name


@ways
@forms
@modes
def test_row_10_an_empty_batch_by_form(form, training, impl, where):
    """As torch's modules to the bit: it is counted, and changes no statistics."""
    ours, theirs = (module.train(training) for module in make_pair(form, impl, where))
    x = torch.zeros(0, 4, 5, 5, device=where)
    found, expected = module_results(ours, x), module_results(theirs, x)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert [int(bn.num_batches_tracked) for bn in norms(ours)] == [0] * len(norms(ours))  # module_results copies
    assert {int(v) for name, v in found.items() if name.endswith("tracked")} == {int(training)}
