"""compare: what is the same function passes, whatever the order of its sums; what is not fails, whatever the fault."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rir_kernels as rir
from rir_kernels.backends import aten
from rir_kernels.equivalence import compare

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(module):
    """With statistics, and BN parameters off their initial ones: nothing is equal by accident."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return module


def image(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def failed(report):
    return {(row.kind, row.name) for row in report.rows if not row.passed}


def row(report, kind, name):
    return next(row for row in report.rows if (row.kind, row.name) == (kind, name))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"stride": 2}, {"stride": 2, "shortcut": "projection"}, {"residual_fraction": 0}, {"residual_fraction": 1},
    {"shortcut": "none", "branch_scale": 0.5, "residual_fraction": 0.25},
])  # fmt: skip
def test_packed_layer_and_its_reference(options, train):
    layer = trained(rir.RiRLayer(8, 16, **options))
    ref = layer.to_reference()
    x = image(4, 8, 9, 9)
    names = {name for name, _ in (*ref.named_parameters(), *ref.named_buffers())}
    for reference, candidate in ((ref, layer), (layer, ref), (layer, layer), (ref, ref)):
        report = compare(reference, candidate, x, train=train)
        assert report, report
        assert {row.name for row in report.rows} == names | {"output", "input"}
        assert report.train == train


def test_names_inside_whole_models():
    class Model(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.stem = layers.ConvBNAct(3, 8, 3)
            options = {"stride": 2, "shortcut": "projection", "outer_streams": "both"}
            self.blocks = nn.Sequential(layers.RiRBlock(8, 12, **options), layers.RiRLayer(12, 6))

        def forward(self, x):
            return self.blocks(self.stem(x)).mean(dim=(2, 3))

    packed, ref = trained(Model(rir)), Model(rir.reference)
    ref.stem.load_state_dict(packed.stem.state_dict())
    ref.blocks[0], ref.blocks[1] = packed.blocks[0].to_reference(), packed.blocks[1].to_reference()
    report = compare(ref, packed, image(4, 3, 8, 8), train=True)
    assert report, report.table(full=True)
    assert row(report, "param grad", "blocks.0.layers.1.conv_tr.weight").shape == (6, 6, 3, 3)
    assert row(report, "param grad", "blocks.0.projection_t.weight").error_max > 0
    assert row(report, "buffer", "blocks.1.bn_t.running_var").passed
    assert len(report.rows) == 2 + len(list(ref.parameters())) + len(list(ref.buffers()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(dtype):
    layer = trained(rir.RiRLayer(8, 8)).to(dtype)
    report = compare(layer.to_reference(), layer, image(4, 8, 8, 8, dtype=dtype))
    assert report, report
    assert {row.dtype for row in report.rows} == {str(dtype).removeprefix("torch."), "int64"}


def test_streams_as_a_tuple():
    layer = trained(rir.RiRLayer(8, 8, residual_fraction=0.25))
    report = compare(layer.to_reference(), layer, (image(2, 2, 6, 6), image(2, 6, 6, 6)))
    assert report, report
    assert [row.name for row in report.rows[:4]] == ["output[0]", "output[1]", "input[0]", "input[1]"]

    plain = trained(rir.RiRLayer(8, 8, residual_fraction=0))
    report = compare(plain.to_reference(), plain, (None, image(2, 8, 6, 6)))
    assert report, report
    assert row(report, "output", "output[0]").shape == (2, 0, 6, 6)


@pytest.mark.interpreter
def test_a_reference_that_asks_for_kernels():
    """Its golden does not get them: they do not take float64."""
    layer = trained(rir.RiRLayer(4, 4, impl="hybrid"))
    assert compare(layer, layer.to_reference(), image(2, 4, 5, 5))
    assert layer.impl == "hybrid"

    plain = trained(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    fused = copy.deepcopy(plain)
    rir.fuse_(fused, impl="hybrid")
    assert type(fused) is not nn.Sequential
    assert compare(fused, plain, image(2, 4, 5, 5)) and compare(plain, fused, image(2, 4, 5, 5))

    class Calls(nn.Conv2d):
        def forward(self, x):
            return rir.functional.conv_bn_act(x, self.weight, training=True)

    calls = Calls(4, 4, 3, bias=False)
    with rir.use_impl("hybrid"):
        assert compare(calls, calls, image(2, 4, 5, 5))


def rir_cifar(seed):
    model = pytest.importorskip("pytorchcv.models.rir_cifar")
    torch.manual_seed(seed)
    return model.CIFARRiR([[8, 8], [16, 16], [16, 16]], init_block_channels=8, final_block_channels=32)


class Reordered(nn.Conv2d):
    """The same convolution, its sums taken in another order."""

    def forward(self, x):
        order = torch.arange(self.in_channels - 1, -1, -1)
        x = x[:, order].contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, self.weight[:, order], self.bias, self.stride, self.padding)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_deep_network_in_another_order(seed):
    model = rir_cifar(seed)
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = Reordered
    report = compare(model, other, image(2, 3, 32, 32))
    assert report, report
    assert row(report, "output", "output").error_max > 0


def lose_residual_gradient(unit):
    original = type(unit)

    class Lost(original):
        def forward(self, r, t):
            identity = self.identity_conv(r) if self.resize_identity else r
            sum_r = self.res_pass_conv(r) + identity.detach() + self.trans_cross_conv(t)
            sum_t = self.trans_pass_conv(t) + self.res_cross_conv(r)
            return self.res_postactiv(sum_r), self.trans_postactiv(sum_t)

    unit.__class__ = Lost


@pytest.mark.parametrize("index", range(6))
def test_lost_residual_gradient_in_one_layer_of_a_deep_network(index):
    model = rir_cifar(0)
    faulty = copy.deepcopy(model)
    lose_residual_gradient([module for module in faulty.modules() if hasattr(module, "res_cross_conv")][index])
    report = compare(model, faulty, image(2, 3, 32, 32))
    assert {kind for kind, _ in failed(report)} == {"input grad", "param grad"}


class Kink(nn.Module):
    """A ReLU whose second unit has the pre-activation `z`, to which the module adds `shift`."""

    def __init__(self, z, shift):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5, 1.0], [1.0, z - 1.0]]))
        self.shift = shift

    def forward(self, x):
        z = x @ self.weight.T
        return F.relu(z + self.shift).sum(dim=1) + z[:, 0]


def test_flipped_mask_within_rounding_of_zero():
    """The mask falls the other way, its gradient is all lost: exact for weights one rounding away, and so it passes."""
    z, x = EPS / 2, torch.ones(1, 2)  # 1 - eps/2 is a float32, so z is what the sum gives, exactly
    report = compare(Kink(z, 0.0), Kink(z, -EPS), x)
    assert report, report
    weight = row(report, "param grad", "weight")
    assert weight.error_max > 0.1 and weight.note.startswith("kink")
    assert "kink" not in row(report, "output", "output").note

    # the same fault where the mask is clear
    report = compare(Kink(1e-3, 0.0), Kink(1e-3, -1.1e-3), x)
    assert ("param grad", "weight") in failed(report)


def test_outputs_have_no_second_look():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1.0 + 16 * EPS)

    ref = nn.Linear(8, 8, bias=False)
    candidate = copy.deepcopy(ref)
    candidate.__class__ = Scaled
    report = compare(ref, candidate, image(4, 8))
    assert any("kink" in row.note for row in report.rows)
    assert failed(report) == {("output", "output")}


def convolution(fault):
    """F.conv2d with a fault in one of its two gradients."""

    class Conv(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, stride, padding):
            ctx.save_for_backward(x, weight)
            ctx.options = stride, padding
            return F.conv2d(x, weight, None, stride, padding)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            dw = torch.nn.grad.conv2d_weight(x, weight.shape, grad, *ctx.options).clone()
            if fault == "data gradient":
                weight = weight.clone()
                weight[:, :, 0, 0] = 0
            if fault == "weight gradient":
                dw[:, :, 2, 1] *= 0.99
            return torch.nn.grad.conv2d_input(x.shape, weight, grad, *ctx.options), dw, None, None

    return Conv.apply


def mutated(fault):
    """aten.conv_bn_act with one fault."""

    def run(x, weight, gamma, beta, mean, var, *, residuals, spec, training, momentum, **_):
        if fault == "wrong tap":
            weight = torch.cat([weight[..., :2], weight[..., 1:2]], dim=3)
        if fault == "swapped streams":
            weight = weight.roll(weight.shape[1] // 2, dims=1)
        z = convolution(fault)(x, weight, spec.stride, spec.padding)
        shortcut = spec.shortcut(x)
        if fault == "no residual":
            shortcut = shortcut * 0
        if fault == "residual's gradient":
            shortcut = shortcut.detach()
        z = torch.cat([z[:, : spec.shortcut_channels] + shortcut, z[:, spec.shortcut_channels :]], dim=1)
        if training:
            batch_mean = z.mean(dim=(0, 2, 3))
            batch_var = z.var(dim=(0, 2, 3), unbiased=fault != "n for n - 1")
            factor = momentum * (1.01 if fault == "momentum" else 1.0)
            with torch.no_grad():
                mean.lerp_(batch_mean, 0.0 if fault == "stale mean" else factor)
                var.lerp_(batch_var, factor)
            y = F.batch_norm(z, None, None, gamma, beta, True, 0.0, spec.eps)
        else:
            y = F.batch_norm(z, mean, var, gamma, beta, False, 0.0, spec.eps)
        return F.leaky_relu(y, 1e-3) if fault == "leaky" else y.relu()

    return run


FAULTS = {  # what must fail, at least
    "wrong tap": ("output", "output"),
    "swapped streams": ("output", "output"),
    "no residual": ("output", "output"),
    "leaky": ("output", "output"),
    "n for n - 1": ("buffer", "bn_t.running_var"),
    "momentum": ("buffer", "bn_r.running_mean"),
    "stale mean": ("buffer", "bn_r.running_mean"),
    "residual's gradient": ("input grad", "input"),
    "data gradient": ("input grad", "input"),
    "weight gradient": ("param grad", "conv_rt.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_training(fault, monkeypatch):
    layer = trained(rir.RiRLayer(8, 8))
    ref, x = layer.to_reference(), image(8, 8, 12, 12)
    monkeypatch.setattr(aten, "conv_bn_act", mutated("none"))
    assert compare(ref, layer, x)  # the mutant without a fault passes: the fault alone is what is caught
    monkeypatch.setattr(aten, "conv_bn_act", mutated(fault))
    report = compare(ref, layer, x)
    assert not report
    assert FAULTS[fault] in failed(report), report


def test_statistics_must_not_move_in_eval():
    class Drifting(nn.BatchNorm2d):
        def forward(self, x):
            self.running_mean *= 1.0 + EPS  # within any budget
            return super().forward(x)

    ref = trained(nn.Sequential(nn.BatchNorm2d(4)))
    candidate = copy.deepcopy(ref)
    candidate[0].__class__ = Drifting
    report = compare(ref, candidate, image(2, 4, 6, 6), train=False)
    assert failed(report) == {("buffer", "0.running_mean")}
    assert row(report, "buffer", "0.running_mean").note == "changed in eval mode"
    assert compare(candidate, candidate, image(2, 4, 6, 6), train=False)  # as the reference does it itself


def test_batches_must_be_counted():
    class Uncounted(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum)

    ref = nn.BatchNorm2d(4)
    candidate = copy.deepcopy(ref)
    candidate.__class__ = Uncounted
    assert failed(compare(ref, candidate, image(2, 4, 3, 3))) == {("buffer", "num_batches_tracked")}


class Offset(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y + torch.tensor([0.0, 0.0, 0.25, 0.0], dtype=y.dtype)


def test_numbers_of_a_row():
    ref = nn.Linear(8, 4)
    candidate = copy.deepcopy(ref)
    candidate.__class__ = Offset
    x = image(6, 8)
    golden = copy.deepcopy(ref).double()(x.double())
    own_error = (ref(x).double() - golden).abs().max().item()
    errors = candidate(x).double() - golden

    got = row(compare(ref, candidate, x), "output", "output")
    assert got.error_max == errors.abs().max().item() == pytest.approx(0.25, abs=1e-6)
    assert got.error_rms == pytest.approx(errors.square().mean().sqrt().item())
    assert got.reference_error_max == own_error
    assert got.budget == pytest.approx(2 * own_error + 2 * EPS * golden.abs().max().item(), rel=1e-6)
    assert (got.shape, got.dtype, got.worst_channel, got.passed) == ((6, 4), "float32", 2, False)


def test_the_other_memory_format_counts_as_the_reference_too():
    """A reference that is exact in one format and not in the other: its own error is the larger one."""

    class ByFormat(nn.Module):
        def __init__(self, error, everywhere=False):
            super().__init__()
            self.error, self.everywhere = error, everywhere

        def forward(self, x):
            off = self.everywhere or (x.dtype == torch.float32 and not x.is_contiguous())
            return x * (1 + self.error) if off else x * 1.0

    x = image(2, 3, 4, 4)
    report = compare(ByFormat(1e-4), ByFormat(1e-4, everywhere=True), x)
    assert report and row(report, "output", "output").reference_error_max > 1e-5
    assert not compare(ByFormat(0.0), ByFormat(1e-4, everywhere=True), x)
    assert not compare(ByFormat(1e-4), ByFormat(1e-3, everywhere=True), x)


def test_a_module_that_takes_one_format_only():
    class Flat(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).view(len(x), -1)

    module = Flat(3, 4, 3)
    with pytest.raises(RuntimeError, match="view"):
        module(image(2, 3, 6, 6).to(memory_format=torch.channels_last))
    assert compare(module, module, image(2, 3, 6, 6))


def test_worst_channel_of_parameters_and_images():
    class Wrong(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight * torch.tensor([1.0, 1.0, 1.5]).to(x).reshape(3, 1, 1, 1), None)

    ref = nn.Conv2d(2, 3, 3, bias=False)
    candidate = copy.deepcopy(ref)
    candidate.__class__ = Wrong
    report = compare(ref, candidate, image(2, 2, 5, 5))
    assert row(report, "output", "output").worst_channel == 2
    assert row(report, "param grad", "weight").worst_channel == 2


class BiasGradient(nn.Conv2d):
    """A convolution whose bias gets another gradient: `factor` for the exact zero."""

    factor = 0.0

    def forward(self, x):
        y = F.conv2d(x, self.weight, None)
        bias = self.bias.detach() + self.factor * (self.bias - self.bias.detach())
        return y + bias.reshape(-1, 1, 1) if self.factor else y + self.bias.detach().reshape(-1, 1, 1)


def test_bias_before_a_norm_is_judged_at_the_scale_of_its_weight():
    ref = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    x = image(4, 4, 10, 10)
    without = copy.deepcopy(ref)
    without[0].__class__ = BiasGradient  # no gradient at all, where the reference has rounding
    for pair in ((ref, ref), (ref, without), (without, without)):
        assert compare(*pair, x)
    report = compare(ref, without, x)
    assert row(report, "param grad", "0.bias").note == "zero but for rounding"
    assert row(report, "param grad", "0.weight").note == ""

    class Leaking(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + 1e-3 * (self[0].bias - self[0].bias.detach()).reshape(-1, 1, 1)

    leaking = copy.deepcopy(ref)
    leaking.__class__ = Leaking
    assert failed(compare(ref, leaking, x)) == {("param grad", "0.bias")}


def test_missing_gradients_count_as_zeros():
    class Unused(nn.Linear):
        def __init__(self, use):
            super().__init__(3, 3)
            self.spare = nn.Parameter(torch.ones(3))
            self.use = use

        def forward(self, x):
            y = super().forward(x)
            return y if self.use is None else y + self.use * (self.spare - self.spare.detach())

    def pair(one, other):
        one, other = Unused(one), Unused(other)
        other.load_state_dict(one.state_dict())
        return compare(one, other, image(2, 3))

    assert pair(None, None) and pair(None, 0.0) and pair(0.0, None)
    assert failed(pair(None, 1e-30)) == failed(pair(1.0, None)) == {("param grad", "spare")}


def test_frozen_parameters():
    layer = trained(rir.RiRLayer(4, 4))
    ref = layer.to_reference()
    ref.conv_rr.weight.requires_grad_(False)
    assert failed(compare(ref, layer, image(2, 4, 5, 5))) == {("param grad", "conv_rr.weight")}
    for module in (ref, layer):
        module.requires_grad_(False)
    report = compare(ref, layer, image(2, 4, 5, 5))
    assert report and row(report, "input grad", "input").error_max > 0


def test_unmatched_names_fail():
    one, other = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3, bias=False))
    nn.init.zeros_(one[0].bias)
    other[0].weight = one[0].weight
    other.register_buffer("extra", torch.ones(2))
    report = compare(one, other, image(2, 3))
    assert failed(report) == {("param grad", "0.bias"), ("buffer", "extra")}
    assert row(report, "param grad", "0.bias").note == "only in the reference"
    assert row(report, "buffer", "extra").note == "only in the candidate"
    assert "only in the candidate" in str(report)


def test_unlike_shapes_and_dtypes_fail():
    class Wide(nn.BatchNorm1d):
        def __init__(self, channels):
            super().__init__(3)
            self.register_buffer("state", torch.zeros(channels))
            self.register_buffer("count", torch.zeros(1, dtype=torch.int64 if channels > 1 else torch.int32))

    report = compare(Wide(1), Wide(2), image(4, 3))
    assert failed(report) == {("buffer", "state"), ("buffer", "count")}
    assert "expected the shape (1,), got (2,)" in row(report, "buffer", "state").note
    assert "expected torch.int32, got torch.int64" in row(report, "buffer", "count").note


class Returns(nn.Module):
    """x as `nest` puts it."""

    def __init__(self, nest):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.nest = nest

    def forward(self, x):
        return self.nest(x * self.weight)


@pytest.mark.parametrize(("nest", "name"), [
    (lambda y: [y, y], "structure"),
    (lambda y: (y, y, y), "output[2]"),
    (lambda y: (y,), "output[1]"),
    (lambda y: (y, y.double()), "output[1]"),
    (lambda y: (y, y[:1]), "output[1]"),
    (lambda y: (y, None), "output[1]"),
    (lambda y: {"a": y}, "structure"),
])  # fmt: skip
def test_unlike_outputs_fail_and_gradients_are_left_out(nest, name):
    report = compare(Returns(lambda y: (y, y)), Returns(nest), image(2, 3))
    assert ("output", name) in failed(report), report
    assert "gradients were not compared" in row(report, "output", name).note
    assert not any("grad" in row.kind for row in report.rows)


def test_any_nesting_and_what_is_no_float():
    def nest(top):
        return lambda y: {"a": [y, None, 3], "top": (y[0] > 0) ^ top}

    report = compare(Returns(nest(False)), Returns(nest(False)), image(2, 3))
    assert report, report
    assert row(report, "output", "output['a'][0]").error_max == 0.0
    assert failed(compare(Returns(nest(False)), Returns(nest(True)), image(2, 3))) == {("output", "output['top']")}
    report = compare(Returns(lambda y: (y, 3)), Returns(lambda y: (y, 4)), image(2, 3))
    assert failed(report) == {("output", "output[1]")}
    assert row(report, "output", "output[1]").note == "expected 3, got 4"
    with pytest.raises(TypeError, match="got a set: wrap the module"):
        compare(Returns(lambda y: {1}), Returns(lambda y: {1}), image(2, 3))


def test_other_weights_are_named_as_the_reason():
    report = compare(nn.Linear(3, 3), nn.Linear(3, 3), image(2, 3))
    assert not report
    model = trained(rir.RiRLayer(4, 4))
    ref = model.to_reference()
    ref.bn_r.running_mean += 1
    ref.conv_tt.weight.data *= 2
    report = compare(ref, model, image(2, 4, 5, 5))
    assert row(report, "buffer", "bn_r.running_mean").note == "the values differed before the run"
    assert row(report, "param grad", "conv_tt.weight").note == "the weights differed before the run"


def test_not_finite():
    class Spoils(nn.Identity):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return torch.where(torch.arange(3) == 1, torch.tensor(self.value, dtype=x.dtype), x * 1.0)

    x = image(2, 3)
    assert compare(Spoils(math.nan), Spoils(math.nan), x) and compare(Spoils(math.inf), Spoils(math.inf), x)
    for one, other in ((0.0, math.nan), (math.nan, 0.0), (math.inf, -math.inf), (math.inf, math.nan), (0.0, math.inf)):
        assert failed(compare(Spoils(one), Spoils(other), x)) == {("output", "output")}, (one, other)

    overflowing = nn.Linear(3, 3).half()
    report = compare(overflowing, overflowing, torch.full((2, 3), 60000.0, dtype=torch.half))
    assert "scale the inputs" in row(report, "output", "output").note and not report


def test_shared_parameters_have_every_name():
    shared = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    shared[2].weight = shared[0].weight
    layer = rir.RiRLayer(4, 4)
    twice = nn.Sequential(layer, layer)
    report = compare(shared, shared, image(2, 3))
    assert report and row(report, "param grad", "0.weight").passed and row(report, "param grad", "2.weight").passed
    report = compare(twice, twice, image(2, 4, 5, 5))
    assert report and row(report, "param grad", "1.conv_rr.weight").passed


def everything(module):
    """All that compare could change in a module, as bits."""
    tensors = [*module.state_dict().values(), *(p.grad for p in module.parameters() if p.grad is not None)]
    flags = [(m.training, vars(m).get("impl")) for m in module.modules()]
    return [t.clone() for t in tensors], flags, [(id(p), p.requires_grad, p.grad is None) for p in module.parameters()]


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("train", [True, False])
def test_nothing_is_changed(context, train):
    layer = trained(rir.RiRLayer(4, 4))
    layer(image(2, 4, 5, 5)).sum().backward()
    ref = layer.to_reference().eval()
    ref.bn_t.train()
    x = image(2, 4, 5, 5).requires_grad_()
    before = everything(layer), everything(ref), x.detach().clone()
    state = torch.get_rng_state()
    with context():
        report = compare(nn.Sequential(nn.Dropout(0.0), ref), nn.Sequential(nn.Dropout(0.0), layer), x, train=train)
    assert report and row(report, "input grad", "input").error_max > 0  # gradients there are, whatever the context
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None and torch.equal(x, before[2])
    for old, new in zip(before[:2], (everything(layer), everything(ref)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old[0], new[0], strict=True)) and old[1:] == new[1:]


@pytest.mark.parametrize("enabled", [True, False])
def test_switches_are_given_back(enabled):
    keep = {"deterministic": None, "allow_tf32": None, "fp32_precision": None}
    with torch.backends.mkldnn.flags(enabled=enabled, **keep), torch.backends.nnpack.flags(enabled=enabled):
        assert compare(nn.Conv2d(3, 4, 3), copy.deepcopy(nn.Conv2d(3, 4, 3)), image(2, 3, 5, 5)).rows
        assert torch._C._get_mkldnn_enabled() == torch._C._get_nnpack_enabled() == enabled


def test_inputs_changed_in_place_are_copies():
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    x = image(4, 3)
    before = x.clone()
    assert compare(module, module, x)
    assert torch.equal(x, before)
    with torch.inference_mode():
        x = image(4, 3)
    assert compare(module, module, x)


def test_both_sides_draw_the_same_random_numbers():
    dropout = nn.Dropout(0.5)
    for shape in ((8, 8), (2, 3, 4, 4)):
        assert compare(dropout, dropout, image(*shape))
        assert not compare(dropout, nn.Sequential(dropout, nn.Softplus(beta=50)), image(*shape))


@pytest.mark.parametrize(("arguments", "error", "match"), [
    ((torch.relu, nn.ReLU(), torch.ones(1)), TypeError, "reference must be a torch.nn.Module"),
    ((nn.ReLU(), "x", torch.ones(1)), TypeError, "candidate must be a torch.nn.Module, got str"),
    ((nn.ReLU(), nn.ReLU(), [torch.ones(1)]), TypeError, "inputs must be a tensor or a tuple of tensors, got list"),
    ((nn.ReLU(), nn.ReLU(), (torch.ones(1), 3)), TypeError, "got a tuple of Tensor, int"),
    ((nn.Linear(1, 1), nn.Linear(1, 1, device="meta"), torch.ones(1)), RuntimeError, "same device.*cpu.*meta"),
])  # fmt: skip
def test_refused_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        compare(*arguments)


def test_blind_rows_are_found():
    """Many layers in bf16: PyTorch's own gradients are far off, and the report says that it proves little."""
    model = rir_cifar(0).bfloat16()
    report = compare(model, model, image(2, 3, 32, 32, dtype=torch.bfloat16))
    assert report
    assert sum(row.blind for row in report.rows) > 10
    assert not row(report, "output", "output").blind
    assert not any(row.blind for row in compare(rir_cifar(0), rir_cifar(0), image(2, 3, 32, 32)).rows)
