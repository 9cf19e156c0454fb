"""Bad inputs and faults, 11 to 20: memory that lies otherwise, sizes beyond 32 bits, NaN, infinities and extremes.

The number in a test's name is a kind of bad input.
"""

import pytest
import torch
from torch import nn

import rir_kernels as rir
from rir_kernels.functional import norm_act
from tests.kernels.targets import ieee_fp32  # noqa: F401 (an autouse fixture)
from tests.support.forms import (
    by,
    by_every_form,
    check_call,
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
    formula,
    make_call,
    make_norm_call,
    norm_formula,
    output_gradient,
    run,
)
from tests.support.refusals import call_refused, module_refused

conv_bn_act = rir.functional.conv_bn_act
LAST = torch.channels_last


# 11: one value per channel


@pytest.mark.parametrize("impl", ["auto", "reference", "torch", "triton"])
def test_row_11_one_value_per_channel(impl, launches):  # noqa: F811
    """ValueError in torch's words, which the norm says after the convolution; we say them before it."""
    message = "Expected more than 1 value per channel when training, got input size"
    with pytest.raises(ValueError, match=message):
        nn.BatchNorm2d(6)(torch.zeros(1, 6, 1, 1))
    call_refused(ValueError, f"{message} (1, 6, 1, 1)", x=torch.randn(1, 4, 1, 1), residual=None, impl=impl)
    assert not launches


@forms
def test_row_11_one_value_per_channel_by_form(form):
    """ValueError, and the batch is not counted, but by torch's modules; evaluation is fine."""
    ours, theirs = make_pair(form)
    x = torch.randn(1, 4, 1, 1)
    if form == "fused":
        refused_as_unfused(x)
    else:
        module_refused(ours, ValueError, "Expected more than 1 value per channel", "(1, 6, 1, 1)", inputs=[x])
    # fp32, one pixel: sums of a few products
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_row_11_at_strides():
    """ValueError where it is the stride that leaves one value."""
    x = torch.randn(1, 4, 2, 2)
    for module in (
        rir.RiRLayer(4, 6, stride=2),
        rir.RiRBlock(4, 6, stride=2, shortcut="projection"),
        rir.ConvBNAct(4, 6, 3, stride=2),
    ):
        module_refused(module, ValueError, "Expected more than 1 value per channel", inputs=[x])
        assert module.eval()(x).shape == (1, 6, 1, 1)


# 12 to 14: memory that lies otherwise. Each of these makes a strided tensor out of a dense one, any (N, C, H, W)


def _within(shape, index, memory_format=torch.contiguous_format):
    """shape(n, c, h, w): of a larger tensor, whose part `index` holds the values."""

    def lie(x):
        larger = torch.empty(shape(*x.shape), dtype=x.dtype, device=x.device, memory_format=memory_format).zero_()
        return larger[index].copy_(x)

    return lie


ALL, SECOND = slice(None), slice(None, None, 2)
LIES = {
    "slice of channels": _within(lambda n, c, h, w: (n, c + 5, h, w), (ALL, slice(3, -2))),
    "slice of channels, channels_last": _within(lambda n, c, h, w: (n, c + 5, h, w), (ALL, slice(3, -2)), LAST),
    "slice of rows": _within(lambda n, c, h, w: (n, c, h + 3, w), (ALL, ALL, slice(2, -1)), LAST),
    "every other pixel": _within(lambda n, c, h, w: (n, c, 2 * h, 2 * w), (ALL, ALL, SECOND, SECOND)),
    "every other image": _within(lambda n, c, h, w: (2 * n, c, h, w), (SECOND,), LAST),
    "transposed": lambda x: x.mT.contiguous().mT,
    "transposed, channels_last": lambda x: x.mT.contiguous(memory_format=LAST).mT,
    "one image for all": lambda x: x[:1].expand_as(x),
    "one channel for all": lambda x: x[:, :1].expand_as(x),
    "one pixel for all": lambda x: x[:, :, :1, :1].expand_as(x),
}
lies = pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())


def lying(function, lie, name):
    """`function` with that argument lying so."""

    def call(**arguments):
        value = arguments[name]
        return function(**arguments | {name: tuple(map(lie, value)) if isinstance(value, tuple) else lie(value)})

    return call


@ways
@lies
@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_row_12_strides(name, lie, impl, where):
    """The formula's numbers, forward and backward."""
    taps = {"kernel": 1} if name == "residual" else {"padding": 1}
    tensors, options = make_call(batch=2, size=(5, 6), dtype=torch.float32, residuals=(6,), training=True, **taps)
    dy = output_gradient(tensors, options, 1e-3, function=lying(formula, lie, name))
    golden = run(lying(formula, lie, name), tensors, options, dy, dtype=torch.float64)
    for result, ours in run(lying(by(impl), lie, name), moved(tensors, where), options, dy).items():
        # fp32 sums of up to some hundred numbers of order one; a wrong element is off by as much as it is large
        torch.testing.assert_close(ours.double().cpu(), golden[result], rtol=1e-4, atol=1e-4)


@by_every_form()
def test_row_12_strides_by_form(form, impl, where):
    """The numbers of torch's modules."""
    ours, theirs = make_pair(form, impl, where)
    images = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(where)
    for name in ("slice of channels, channels_last", "transposed", "one image for all", "one channel for all"):
        x = LIES[name](images)
        # fp32 sums of a few dozen numbers of order one, through at most two norms
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_row_12_statistics_whose_channels_share_memory():
    """ValueError before either is updated; evaluation reads them."""
    shared = torch.ones(1).expand(6)
    for impl in ("torch", "reference", "triton"):
        for name in ("running_mean", "running_var"):
            message = f"{name} is updated in training, and its channels share memory"
            call_refused(ValueError, message, impl=impl, training=True, **{name: shared})
    tensors, options = make_call(dtype=torch.float32)
    options |= {"training": False, "impl": "torch"}
    found = by("torch")(**tensors | {"running_var": shared}, **options)
    torch.testing.assert_close(found, by("torch")(**tensors | {"running_var": torch.ones(6)}, **options))


DYS = {
    "stride 0": lambda dy: dy[:1, :1, :1, :1].expand_as(dy),  # what sum().backward() hands down
    "channels_last": lambda dy: dy.contiguous(memory_format=LAST),
} | {name: LIES[name] for name in ("slice of channels", "slice of channels, channels_last", "transposed")}
dys = pytest.mark.parametrize("lie", DYS.values(), ids=DYS.keys())


@ways
@dys
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_row_13_output_gradients_may_lie_otherwise(memory_format, lie, impl, where):
    """The formula's numbers; the mask of the ReLU is read from z, and from y where a residual follows."""
    for training, case in ((True, {}), (False, {"residuals": (6,), "residual_at": "post_norm"})):
        tensors, options = make_call(size=(5, 6), kernel=1, dtype=torch.float32, training=training, **case)
        before = run(formula, tensors, options | {"activation": None}, dtype=torch.float64)["y"]
        assert before.abs().min() > 1e-5  # fp32's errors: no ReLU hangs on them
        dy = lie(torch.randn(before.shape, generator=torch.Generator().manual_seed(9)))
        golden = run(formula, tensors, options, dy, dtype=torch.float64)
        tensors = moved(tensors, where)
        tensors["x"] = tensors["x"].contiguous(memory_format=memory_format)
        dy = lie(torch.randn(before.shape, generator=torch.Generator().manual_seed(9)).to(where))
        for result, ours in run(by(impl), tensors, options, dy).items():
            # fp32 sums of up to some hundred numbers of order one; a wrong element is off by as much as it is large
            torch.testing.assert_close(ours.double().cpu(), golden[result], rtol=1e-4, atol=1e-4)


@by_every_form()
@dys
def test_row_13_output_gradients_by_form(form, lie, impl, where):
    """The gradients of torch's modules."""
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(where)
    dy = lie(torch.randn(2, 6, 5, 6, generator=torch.Generator().manual_seed(9)).to(where))
    grads = []
    for module in make_pair(form, impl, where):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(module(leaf), leaf, dy)[0])
    # fp32 sums of a few hundred products of order one, through at most two norms
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def _unaligned(t):
    """The values of t one element off an address that is a multiple of 16 bytes, with t's strides."""
    flat = torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)
    moved_by_one = flat[1:].as_strided(t.shape, t.stride(), 1).copy_(t)
    assert moved_by_one.data_ptr() % 16
    return moved_by_one


@ways
@modes
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_row_14_unaligned_after_aligned(memory_format, training, impl, where):
    """Right, by the kernels to the bit, for calls of the very shape that was planned for aligned memory before."""
    tensors, options = make_call(
        channels=(8, 8), size=(5, 6), kernel=1, dtype=torch.float32, residuals=(8,), bias=True, training=training
    )
    dy = output_gradient(tensors, options, 1e-3).float().to(where)
    tensors = {n: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for n, t in tensors.items()}
    tensors = moved(tensors, where)

    def off(**call):
        """Every tensor at another place; the running statistics are handed back."""
        there = {n: _unaligned(t) if isinstance(t, torch.Tensor) else t for n, t in call.items()}
        y = by(impl)(**there | {"residual": tuple(map(_unaligned, call["residual"]))})
        for name in ("running_mean", "running_var"):
            call[name].copy_(there[name])
        return y

    aligned = [run(by(impl), tensors, options, dy) for _ in range(2)][1]
    for function, gradient in ((off, dy), (by(impl), _unaligned(dy)), (by(impl), dy)):
        for name, result in run(function, tensors, options, gradient).items():
            # the running statistics by a kernel, or by torch's operators: the order of three roundings may differ
            rtol, atol = 4 * 2**-24 if "running" in name and impl == "triton" else 0, 0
            if impl == "torch":  # its products may be summed in another order: 8 terms, or 60 in the weight's gradient
                rtol, atol = 64 * 2**-24, 64 * 2**-24
            torch.testing.assert_close(result, aligned[name], rtol=rtol, atol=atol, msg=lambda m, name=name: name + m)


# 15 and 16: large


@ways
@pytest.mark.parametrize("shape", [(1, 8, 3, 4), (2, 1, 3, 4), (2, 8, 1, 4), (2, 8, 3, 1), (1, 1, 1, 5)], ids=str)
def test_row_15_huge_strides_of_dimensions_of_one(shape, impl, where):
    """They mean nothing: the same bits as of dense tensors (from ATen, which may convolve otherwise, its rounding)."""

    def lie(x):
        return x.as_strided(x.shape, [2**40 + 1 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])

    n, c, *size = shape
    tensors, options = make_call(
        channels=(c, c), batch=n, size=tuple(size), kernel=1, dtype=torch.float32, residuals=(c,), training=True
    )
    tensors = {name: t.contiguous(memory_format=LAST) if t.dim() == 4 else t for name, t in tensors.items()}
    tensors, dy = moved(tensors, where), torch.randn(shape, generator=torch.Generator().manual_seed(9))
    expected = run(by(impl), tensors, options, dy)
    found = run(lying(lying(by(impl), lie, "x"), lie, "residual"), tensors, options, lie(dy))
    for name, result in expected.items():
        # fp32 sums of a few dozen products of order one
        torch.testing.assert_close(found[name], result, rtol=0, atol=0 if impl == "triton" else 1e-4)


@ways
@modes
@pytest.mark.parametrize("images", [2, 3])
def test_row_15_more_than_2_to_the_31_apart(images, training, impl, where):
    """Images further apart than 32 bits can count, or where only their stride can be: numbers as in the test before.

    No page between them is touched.
    """
    step = 2**31 // (images - 1) + 64

    def far(x):
        _, c, _, w = x.shape
        memory = torch.empty((images - 1) * step + 128, dtype=x.dtype, device=x.device)
        return memory.as_strided(x.shape, (step, 1, w * c, c)).copy_(x)

    # one pixel out: what is read as evenly spaced rows is so far apart as well
    case = {"channels": (8, 8), "batch": images, "size": (3, 3), "residuals": (8,), "residual_at": "post_norm"}
    tensors, options = make_call(dtype=torch.float16, norm_dtype=torch.float32, training=training, **case)
    tensors = moved(tensors, where)
    dy = torch.randn(images, 8, 1, 1, generator=torch.Generator().manual_seed(9)).half().to(where)
    results = []
    for place in (lambda x: x.contiguous(memory_format=LAST), far):
        call = {name: t.clone() for name, t in tensors.items()}
        # leaves: the gradient of a view would fill what is between
        x, residual = (place(call.pop(name)).requires_grad_() for name in ("x", "residual0"))
        weight = call.pop("weight").requires_grad_()
        y = conv_bn_act(x, weight, **call, residual=residual, impl=impl, **options)
        grads = torch.autograd.grad(y, (x, weight, residual), place(dy))
        results.append((y.detach(), *grads, call["running_mean"], call["running_var"]))
    for near, distant in zip(*results, strict=True):
        # ATen may convolve otherwise: sums of up to 72 products of order one, rounded to half
        torch.testing.assert_close(
            near, distant, **{"rtol": 2**-8, "atol": 2**-6} if impl == "torch" else {"rtol": 0, "atol": 0}
        )


@pytest.mark.gpu
@pytest.mark.real_gpu("60 GiB of memory")
def test_row_15_more_than_2_to_the_31_elements():
    """Every image gets what one alone gets, forward and backward: all 33 are the same, and so are the statistics."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    one = [torch.randn(1, 64, 1024, 1024, generator=generator, device="cuda").half() for _ in range(2)]
    weight = torch.randn(64, 64, 1, 1, generator=generator, device="cuda").half() / 8
    weight.requires_grad_()
    results, sums = [], []
    for images in (1, 33):
        x, dy = (t.expand(images, -1, -1, -1).contiguous(memory_format=LAST) for t in one)
        y = conv_bn_act(x.requires_grad_(), weight, training=True, impl="triton")
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
        assert torch.equal(y[0], y[-1]) and torch.equal(dx[0], dx[-1])
        results.append((y[-1].detach(), dx[-1]))
        sums.append(dweight.float() / images)
    # the same terms 33 times, each dz rounded to half, and the sums once more
    torch.testing.assert_close(*sums, rtol=1e-2, atol=1e-2 * sums[0].abs().max().item())
    for single, last in zip(*results, strict=True):
        # the statistics are merged from other numbers of tiles: one rounding to half of values below eight
        torch.testing.assert_close(last, single, rtol=2**-10, atol=2**-9)


@ways
def test_row_16_more_images_than_a_grid_has_rows(impl, where):
    """Within twice torch's error at more than 65,535 images, of the norm and of the convolution."""
    case = {"batch": 66_000, "size": (1, 1), "dtype": torch.float32, "training": True}
    tensors, options = make_norm_call(channels=2, **case)
    check_call(tensors, options, impl, where, norm_formula, norm_act)
    if where == "cuda" or impl == "torch":  # a minute in the interpreter
        tensors, options = make_call(channels=(1, 2), kernel=1, **case)
        check_call(tensors, options, impl, where)


@pytest.mark.interpreter
def test_row_16_every_grid_has_one_dimension():
    """Which holds 2^31 - 1 programs; 65,535 is the limit of the others."""
    from rir_kernels.backends import fused
    from rir_kernels.common.spec import ConvBNActSpec
    from rir_kernels.triton.launch import runtime

    x = torch.empty(2**22, 8, 16, 16, device="meta", memory_format=LAST)  # 2^33 elements
    weight, vector = torch.empty(8, 8, 3, 3, device="meta"), torch.empty(8, device="meta")
    spec, programs = ConvBNActSpec(padding=(1, 1)), {}
    with runtime.intercepted(lambda kernel, n, *_args, **_options: programs.update({kernel.__name__: n})):
        _, z, mean, _, invstd = fused.forward(
            x, weight, None, vector, vector, None, None, [], spec, training=True, save=True, impl="triton"
        )
        fused.backward(
            x, x, weight, z, None, mean, invstd, vector, vector, spec, training=True, needs=[True] * 6, impl="triton"
        )
    assert {type(n) for n in programs.values()} == {int} and max(programs.values()) < 2**31
    assert sum(n > 65_535 for n in programs.values()) >= 3, programs  # two of convolution, one of normalization


# 17 and 18: NaN and infinities


def assert_as_torch(tensors, options, impl, where, dy=None, function=conv_bn_act):
    """NaN, infinities and finite numbers where torch's own operators, in the same dtype, have them."""
    tensors = moved(tensors, where)
    expected, found = (run(by(i, function), tensors, options, dy) for i in ("reference", impl))
    for name, value in expected.items():
        result = found[name]
        if name == "dbias" and options["training"]:
            continue  # zero in exact numbers before batch statistics: torch sums dz, the kernels do not compute it
        if name.startswith("running"):  # which of the two depends on the order of summation, in torch's own as well
            result, value = (t.where(t.isfinite(), float("nan")) for t in (result, value))
        # fp32 sums of a few dozen products of order one
        torch.testing.assert_close(
            result, value, rtol=1e-3, atol=1e-3, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    return found


VALUES = [float("nan"), float("inf"), float("-inf")]
others = [0, 1, 3, 4, 5]


@ways
@modes
@pytest.mark.parametrize("activation", ["relu", None])
def test_row_17_nan_in_one_channel(activation, training, impl, where):
    """It stays there, in the output, the statistics and what is per channel; the ReLU passes it."""
    tensors, options = make_call(dtype=torch.float32, padding=1, training=training, activation=activation, bias=True)
    tensors["bias"][2] = float("nan")  # so z has it in channel 2 alone
    dy = torch.randn(3, 6, 7, 6, generator=torch.Generator().manual_seed(9))
    found = assert_as_torch(tensors, options, impl, where, dy)
    assert found["y"][:, 2].isnan().any() and found["y"][:, others].isfinite().all()
    for name in ("running_mean", "running_var"):
        assert found[name][2].isnan() == training and found[name][others].isfinite().all()
    assert found["dweight"][others].isfinite().all() and found["dbn_weight"][others].isfinite().all()


@ways
@modes
@pytest.mark.parametrize("value", VALUES)
def test_rows_17_and_18_one_value_in_one_channel(value, training, impl, where):
    """In training its channel is NaN, and no other; evaluation changes that one pixel. By the norm alone."""
    tensors, options = make_norm_call(channels=6, dtype=torch.float32, training=training)
    tensors["x"][1, 2, 3, 3] = value
    found = assert_as_torch(tensors, options, impl, where, function=norm_act)
    assert found["y"][:, others].isfinite().all()
    if training:
        assert found["y"][:, 2].isnan().all() and not found["running_mean"][2].isfinite()
        assert found["running_var"][2].isnan()


@ways
@modes
@pytest.mark.parametrize("value", VALUES)
def test_row_18_through_the_convolution(value, training, impl, where):
    """As torch: its neighbourhood in evaluation, every channel in training."""
    tensors, options = make_call(dtype=torch.float32, padding=1, training=training)
    tensors["x"][1, 2, 3, 3] = value
    assert_as_torch(tensors, options, impl, where)


@by_every_form()
@pytest.mark.parametrize("value", VALUES)
def test_rows_17_and_18_by_form(form, value, impl, where):
    """As torch's modules, in evaluation and in training, where the statistics become NaN."""
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(where)
    x[1, 2, 3, 3] = value
    for training in (False, True):
        ours, theirs = (module.train(training) for module in make_pair(form, impl, where))
        # fp32 sums of a few dozen numbers of order one, through at most two norms
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4, equal_nan=True)
        assert all(bn.running_var.isnan().any() == training for bn in norms(ours))


# 19 and 20: extremes


@ways
@pytest.mark.parametrize("case", ["constant", "dead", "1e3", "1e4"])
def test_row_19_constant_channels_and_huge_means(case, impl, where):
    """Finite, rsqrt(eps) where the variance is zero, and as near as sums in fp32 can be."""
    tensors, options = make_norm_call(channels=6, batch=8, dtype=torch.float32, training=True)
    x = tensors["x"]
    if case in ("constant", "dead"):
        x[:, 2] = 2.5 if case == "constant" else 0.0
    else:
        x += float(case)
    if case in ("constant", "dead"):
        ours = check_call(tensors, options, impl, where, norm_formula, norm_act, margin=1e-2)
    else:
        # ATen sums in fp64 on a CPU. In fp32 a few roundings of the mean are left, of which y and the gradient of the
        # scale (a sum of pixels times y) see as much; E[x^2] - E[x]^2 would lose every digit
        tensors = moved(tensors, where)
        dy = output_gradient(tensors, options, 1e-1, function=norm_formula)
        golden, ours = (
            run(norm_formula, tensors, options, dy, torch.float64),
            run(by(impl, norm_act), tensors, options, dy),
        )
        off = 4 * torch.finfo(torch.float32).eps * float(case)
        for name, exact in golden.items():
            scale = max(1, exact.abs().max().item()) * (dy[:, 0].numel() if name == "dbn_weight" else 1)
            torch.testing.assert_close(ours[name].double(), exact, rtol=1e-3, atol=off * scale)
    assert all(result.isfinite().all() for result in ours.values())


@ways
def test_row_19_a_convolution_whose_channel_is_constant(impl, where):
    """A filter of zeros: finite, its channel is the norm's bias, and within twice torch's error."""
    tensors, options = make_call(dtype=torch.float32, padding=1, training=True)
    tensors["weight"][2] = 0
    ours = check_call(tensors, options, impl, where)
    assert torch.equal(ours["y"][:, 2], tensors["bn_bias"][2].clamp(min=0).expand(3, 7, 6).to(where))
    assert all(result.isfinite().all() for result in ours.values())


@ways
def test_row_20_values_near_the_largest_of_fp16(impl, where):
    """No sum overflows: within twice torch's error, by the norm and by the convolution before it."""
    sign = torch.where(torch.rand(4, 6, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.4, -1.0, 1.0)
    near = (65504 * sign).half()
    tensors, options = make_norm_call(
        channels=6, batch=4, size=(5, 5), dtype=torch.float16, norm_dtype=torch.float32, training=True
    )
    tensors["x"] = near
    ours = check_call(tensors, options, impl, where, norm_formula, norm_act, margin=0.05)
    assert all(result.isfinite().all() for result in ours.values())
    tensors = moved(tensors, where)
    # the identity as weight: z is x, and only its sums are large
    tensors["weight"] = torch.eye(6, device=where).half()[:, :, None, None]
    found = run(by(impl), tensors, {"training": True})
    torch.testing.assert_close(found["y"], ours["y"], rtol=0, atol=2**-9)  # one rounding to half of values below four
