"""RiRLayer, RiRBlock and ConvBNAct on plain PyTorch against the formula and the reference, all in fp64."""

import copy
import pickle

import pytest
import torch
from torch import nn

import rir_kernels as rir
from rir_kernels import functional, reference
from rir_kernels.streams import pack_weight
from tests.helpers import conv_formula, formula

# outputs and gradients of order one to a hundred, through up to three norms: rounding stays below 1e-11, and a mistake
# is above 1e-3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
GEOMETRIES = pytest.mark.parametrize(
    ("in_channels", "out_channels", "stride", "kernel_size", "size"),
    [(6, 6, 1, 3, (5, 7)), (4, 10, 2, 3, (7, 5)), (9, 5, 2, 1, (6, 6)), (5, 1, 1, 5, (4, 3)), (1, 5, 3, 3, (7, 8))],
)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture(autouse=True)
def _double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def scrambled(module):
    """Norms whose numbers are not ones and zeros, so that none can be forgotten or swapped."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    return module


def results(module, x, *more):
    """y, every gradient of a random loss, and every buffer, by name; the reference's under the packed layer's names."""
    module = copy.deepcopy(module)
    leaves = [t.clone().requires_grad_() for t in (x, *more)]
    y = module(*leaves)
    torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).mul(y).sum().backward()
    named = {name: p.grad for name, p in module.named_parameters()} | dict(module.named_buffers())
    for name, layer in module.named_modules():
        if isinstance(layer, reference.RiRLayer):
            _pack_names(named, f"{name}." if name else "")
    return {"y": y.detach()} | {f"input{i}": leaf.grad for i, leaf in enumerate(leaves)} | named


def _pack_names(named, prefix):
    blocks = [named.pop(f"{prefix}conv_{name}.weight", None) for name in ("rr", "rt", "tr", "tt")]
    named[f"{prefix}weight"] = pack_weight(*blocks)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        halves = [named.pop(f"{prefix}bn_{stream}.{name}", None) for stream in "rt"]
        halves = [half for half in halves if half is not None]
        named[f"{prefix}bn.{name}"] = halves[0] if name == "num_batches_tracked" else torch.cat(halves)


def assert_same_results(module, ref, *inputs):
    ours, theirs = results(module, *inputs), results(ref, *inputs)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def shortcut_formula(layer, x):
    """What joins the sum of a layer: (N, C, H', W')."""
    r = x[:, : layer.in_residual]
    if layer.projection is not None:
        return conv_formula(r, layer.projection.weight, stride=layer.stride)
    return r[:, : layer.out_residual, :: layer.stride, :: layer.stride]


@pytest.mark.parametrize("fraction", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("shortcut", ["pad", "projection", "none"])
@GEOMETRIES
@modes
def test_layer(fraction, shortcut, in_channels, out_channels, stride, kernel_size, size, training):
    layer = scrambled(
        rir.RiRLayer(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            residual_fraction=fraction,
            shortcut=shortcut,
            branch_scale=0.7,
            eps=1e-3,
            momentum=0.3,
        )
    ).train(training)
    x = torch.randn(3, in_channels, *size)
    assert_same_results(layer, layer.to_reference(), x)

    mean, var = layer.bn.running_mean.clone(), layer.bn.running_var.clone()
    expected = formula(
        x, layer.weight, layer.bn.weight, layer.bn.bias, mean, var,
        residual=None if shortcut == "none" else shortcut_formula(layer, x),
        branch_scale=0.7, stride=stride, padding=kernel_size // 2, training=training, momentum=0.3, eps=1e-3,
    )  # fmt: skip
    y = layer(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(layer.bn.running_mean, mean, **CLOSE)
    torch.testing.assert_close(layer.bn.running_var, var, **CLOSE)

    c = layer.in_residual
    r, t = layer.eval()(x[:, :c] if c else None, x[:, c:] if c < in_channels else None)
    assert (r.shape[1], t.shape[1]) == (layer.out_residual, out_channels - layer.out_residual)
    assert torch.equal(torch.cat([r, t], 1), layer(x))


@pytest.mark.parametrize("outer_shortcut", ["pre_norm", "post_act", "none"])
@pytest.mark.parametrize("outer_streams", ["residual", "both"])
@pytest.mark.parametrize("shortcut", ["pad", "projection", "none"])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "stride", "fraction", "num_layers", "training"),
    [
        (6, 6, 1, 0.5, 2, True), (4, 8, 2, 0.25, 2, False), (8, 4, 1, 0.5, 3, True), (4, 6, 2, 0, 2, True),
        (4, 6, 2, 1, 1, True), (1, 4, 2, 0.5, 2, True),
    ],
)  # fmt: skip
def test_block(
    outer_shortcut, outer_streams, shortcut, in_channels, out_channels, stride, fraction, num_layers, training
):
    block = scrambled(
        rir.RiRBlock(
            in_channels,
            out_channels,
            num_layers=num_layers,
            stride=stride,
            outer_shortcut=outer_shortcut,
            outer_streams=outer_streams,
            residual_fraction=fraction,
            shortcut=shortcut,
            branch_scale=0.6,
            eps=1e-3,
            momentum=None,
        )
    ).train(training)
    x = torch.randn(3, in_channels, 5, 7)
    assert_same_results(block, block.to_reference(), x)
    block.eval()
    c = block.in_residual
    r, t = block(x[:, :c] if c else None, x[:, c:] if c < in_channels else None)
    assert (r.shape[1], t.shape[1]) == (block.out_residual, out_channels - block.out_residual)
    assert torch.equal(torch.cat([r, t], 1), block(x))


@pytest.mark.parametrize("residual_at", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("widths", [(), (2,), (6, 3)])
@modes
def test_unit(residual_at, activation, widths, training):
    options = {
        "stride": (2, 1), "groups": 2, "bias": True, "residual_at": residual_at, "branch_scale": 0.4,
        "activation": activation, "eps": 1e-3, "momentum": 0.2,
    }  # fmt: skip
    unit, ref = scrambled(rir.ConvBNAct(4, 6, 3, **options)), reference.ConvBNAct(4, 6, 3, **options)
    ref.load_state_dict(unit.state_dict())
    residuals = [torch.randn(3, width, 4, 5) for width in widths]

    class Call(nn.Module):  # the residuals as inputs of their own, so that their gradients are compared as well
        def __init__(self, unit):
            super().__init__()
            self.unit = unit

        def forward(self, x, *residuals):
            return self.unit(x, residuals[0] if len(residuals) == 1 else residuals or None)

    assert_same_results(Call(unit).train(training), Call(ref).train(training), torch.randn(3, 4, 7, 5), *residuals)


@pytest.mark.parametrize(("kernel_size", "padding"), [(3, None), ((5, 3), None), (4, None), (3, 0)])
def test_unit_starts_as_torchs_own(kernel_size, padding):
    """Same seed, same names, same numbers, same size of output as Conv2d and BatchNorm2d."""
    torch.manual_seed(1)
    unit = rir.ConvBNAct(4, 6, kernel_size, stride=2, padding=padding)
    torch.manual_seed(1)
    expected = reference.ConvBNAct(4, 6, kernel_size, stride=2, padding=padding)  # compared with torch's by its tests
    ours, theirs = unit.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert unit(torch.randn(2, 4, 7, 7)).shape == expected(torch.randn(2, 4, 7, 7)).shape


# the shortcut without parameters: exact


def only_the_shortcut(module):
    """Weights zero, and a norm that is the identity to the last bit: 2 * z / sqrt(3 + 1)."""
    for m in module.modules():
        if isinstance(m, rir.RiRLayer):
            nn.init.zeros_(m.weight)
            m.bn.eps = 1.0
            nn.init.constant_(m.bn.running_var, 3.0)
            nn.init.constant_(m.bn.weight, 2.0)
    return module.eval()


@pytest.mark.parametrize(("in_channels", "out_channels"), [(4, 10), (10, 4), (4, 4)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pad_shortcut_is_exact(in_channels, out_channels, stride):
    layer = only_the_shortcut(rir.RiRLayer(in_channels, out_channels, stride=stride, dtype=torch.float32))
    x = torch.rand(2, in_channels, 7, 6).float()  # positive: the ReLU lets everything through
    y, kept = layer(x), min(in_channels, out_channels) // 2
    assert torch.equal(y[:, :kept], x[:, :kept, ::stride, ::stride])
    assert torch.equal(y[:, kept:], torch.zeros_like(y[:, kept:]))


@pytest.mark.parametrize("outer_shortcut", ["pre_norm", "post_act"])
def test_outer_pad_shortcut_is_exact(outer_shortcut):
    block = only_the_shortcut(
        rir.RiRBlock(4, 6, stride=2, outer_shortcut=outer_shortcut, outer_streams="both", shortcut="none")
    )
    x = torch.rand(2, 4, 7, 5)
    expected = torch.zeros(2, 6, 4, 3)
    expected[:, 0:2] = x[:, :2, ::2, ::2]
    expected[:, 3:5] = x[:, 2:, ::2, ::2]
    assert torch.equal(block(x), expected)


# state and modes


def test_names():
    def keys(module):
        return list(module.state_dict())

    norm = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    assert keys(rir.RiRLayer(4, 6)) == ["weight", *norm]
    assert keys(rir.RiRLayer(4, 6, shortcut="projection")) == ["weight", *norm, "projection.weight"]
    assert keys(rir.ConvBNAct(4, 6, 3, bias=True)) == ["conv.weight", "conv.bias", *norm]
    block = rir.RiRBlock(4, 6, shortcut="projection", outer_streams="both")
    assert keys(block)[-2:] == ["projection.weight", "projection_t.weight"]
    assert keys(block)[:2] == ["layers.0.weight", "layers.0.bn.weight"]
    assert rir.RiRLayer(4, 6).projection is None


def test_initial_variance_is_he_with_the_packed_fan_in():
    layer = rir.RiRLayer(48, 96, stride=2, shortcut="projection", residual_fraction=0.25)
    for weight, fan_in in ((layer.weight, 48 * 9), (layer.projection.weight, 12)):
        # the sample variance of n normals has the relative deviation sqrt(2 / n); 5 of them, and the seed is fixed
        assert weight.var().item() == pytest.approx(2 / fan_in, rel=5 * (2 / weight.numel()) ** 0.5)


MODULES = {
    "layer": lambda: rir.RiRLayer(4, 6, stride=2, shortcut="projection", branch_scale=0.5),
    "block": lambda: rir.RiRBlock(4, 6, stride=2, outer_streams="both"),
    "unit": lambda: rir.ConvBNAct(4, 6, 3),
}
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


@modules
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_row_51_copies_are_equal_and_independent(make, duplicate):
    module, x = scrambled(make()), torch.randn(3, 4, 7, 5)
    twin = duplicate(module)
    for name, expected in results(module, x).items():
        assert torch.equal(results(twin, x)[name], expected), name
    before = module(x)
    for p in twin.parameters():
        nn.init.zeros_(p)
    module.bn_check = None
    twin.train()(x)
    assert torch.equal(module(x), before)


@modules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casts(make, dtype):
    module = scrambled(make())
    x = torch.randn(3, 4, 7, 5).to(dtype)
    y = copy.deepcopy(module).to(dtype)(x)
    assert y.dtype == dtype
    # parameters, inputs and every step are rounded: a dozen roundings of values of order one
    torch.testing.assert_close(y.double(), module(x.double()), rtol=0, atol=12 * torch.finfo(dtype).eps)


@modules
def test_channels_last(make):
    module, x = make(), torch.randn(3, 4, 7, 5)
    expected = module(x)
    assert expected.is_contiguous()
    module.to(memory_format=torch.channels_last)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        y = module(x.contiguous(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, expected, **CLOSE)


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


@modules
def test_every_batch_is_counted_once(make):
    module = make()
    for expected in (1, 2):
        module(torch.randn(3, 4, 7, 5))
        assert [int(bn.num_batches_tracked) for bn in norms(module)] == [expected] * len(norms(module))
    module(torch.randn(0, 4, 7, 5))  # an empty one too, as by torch
    module.eval()(torch.randn(3, 4, 7, 5))
    assert [int(bn.num_batches_tracked) for bn in norms(module)] == [3] * len(norms(module))


@modules
def test_nothing_is_counted_where_the_operation_fails(make, monkeypatch):
    module = make()
    before = copy.deepcopy(module.state_dict())

    def failing(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(functional.aten, "conv_bn_act", failing)
    with pytest.raises(torch.OutOfMemoryError):
        module(torch.randn(3, 4, 7, 5))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0, 0.25])
def test_momentum_rule_is_batch_norms(momentum):
    layer, x = rir.RiRLayer(4, 6, momentum=momentum, shortcut="none"), [torch.randn(3, 4, 5, 5) for _ in range(3)]
    bn = nn.BatchNorm2d(6, momentum=momentum)
    for batch in x:
        layer(batch)
        bn(conv_formula(batch, layer.weight, padding=1))
    for name, expected in bn.state_dict().items():
        torch.testing.assert_close(layer.bn.state_dict()[name], expected, **CLOSE)


@modules
def test_a_frozen_norm_uses_and_keeps_its_statistics(make):
    module, x = scrambled(make()), torch.randn(3, 4, 7, 5)
    expected = results(copy.deepcopy(module).eval(), x)
    module.train()
    for bn in norms(module):
        bn.eval()
    for name, result in results(module, x).items():
        assert torch.equal(result, expected[name]), name


@modules
def test_frozen_parameters_get_no_gradient(make):
    module, x = make(), torch.randn(3, 4, 7, 5)
    expected = results(module, x)
    for bn in norms(module):
        bn.requires_grad_(False)
    for name, result in results(module, x).items():
        assert result is None if name.endswith(("bn.weight", "bn.bias")) else torch.equal(result, expected[name]), name
    assert not module.requires_grad_(False)(x).requires_grad


@modules
def test_row_29_two_forwards_then_two_backwards(make):
    module, batches = make(), [torch.randn(3, 4, 7, 5) for _ in range(2)]

    def gradients(backward_last):
        twin = copy.deepcopy(module)
        losses = []
        for batch in batches:
            loss = twin(batch).square().sum()
            losses.append(loss) if backward_last else loss.backward()
        for loss in losses:
            loss.backward()
        return [p.grad for p in twin.parameters()]

    for together, apart in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(together, apart, **CLOSE)


@pytest.mark.parametrize("missing", ["affine", "track_running_stats"])
@modes
def test_row_23_norms_without_parameters_or_statistics(missing, training):
    layer = rir.RiRLayer(4, 6)
    layer.bn = nn.BatchNorm2d(6, **{missing: False})
    layer.train(training)
    x = torch.randn(3, 4, 5, 5)
    assert_same_results_without_norm_state(layer, x)


def assert_same_results_without_norm_state(layer, x):
    bn = copy.deepcopy(layer.bn)
    z = conv_formula(x, layer.weight, padding=1)
    z[:, :2] += x[:, :2]
    torch.testing.assert_close(layer(x), bn(z.detach()).relu(), **CLOSE)
    assert layer.bn.state_dict().keys() == bn.state_dict().keys()
    for name, expected in bn.state_dict().items():
        torch.testing.assert_close(layer.bn.state_dict()[name], expected, **CLOSE)
