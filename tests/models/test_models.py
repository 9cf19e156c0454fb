"""The four networks: their parameter counts are the literature's, their numbers those of formulas written again."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import rir_kernels
from models.rir import THIN, VARIANTS, RiR
from rir_kernels import reference
from tests.support.helpers import scrambled

SMALL = {"width": (8, 12, 20), "depth": (1, 2, 1), "dtype": torch.float64}
SWITCHES = {name: dict(zip(("inner_shortcut", "outer_shortcut"), key, strict=True)) for key, name in VARIANTS.items()}
OUTER_PROJECTIONS = 48 * 96 + 96 * 192
ONE_LAYER_A_BLOCK = sum(blocks * (9 * c**2 + 2 * c) for blocks, c in ((2, 96), (3, 192), (3, 384)))


def count(model):
    return sum(p.numel() for p in model.parameters())


def built(variant, **options):
    torch.manual_seed(0)
    return scrambled(RiR(3, **SWITCHES[variant], **(SMALL | options)))


@pytest.mark.parametrize("layers", [reference, rir_kernels], ids=["reference", "package"])
@pytest.mark.parametrize("variant", SWITCHES)
def test_parameter_count_of_the_wide_networks(layers, variant):
    assert count(RiR(**SWITCHES[variant], layers=layers, device="meta")) == 9_469_940


@pytest.mark.parametrize(
    ("variant", "options", "expected"),
    [
        ("RiR", {"outer_streams": "both", "outer_at": "post_act", "residual_fraction": 0.25}, 9_469_940),
        ("ResNet Init", {"shortcut": "projection"}, 9_492_980),  # pytorchcv's rir_cifar10
        ("ResNet Init", {"shortcut": "projection", "num_classes": 100}, 9_527_720),  # its rir_cifar100
        ("RiR", {"shortcut": "projection"}, 9_492_980 + OUTER_PROJECTIONS),  # the outer ones as well
        ("ResNet", {"shortcut": "projection"}, 9_469_940 + 4 * OUTER_PROJECTIONS),  # the full width
        ("CNN", {"head": "linear"}, 9_469_940 - 20 + 10),  # the norm's weight and bias go, a bias comes
        ("RiR", {"layers_per_block": 1}, 9_469_940 - ONE_LAYER_A_BLOCK),
        ("ResNet", {"layers_per_block": 3}, 9_469_940 + ONE_LAYER_A_BLOCK),
    ],
)
@pytest.mark.parametrize("layers", [reference, rir_kernels], ids=["reference", "package"])
def test_parameter_count_with_options(layers, variant, options, expected):
    assert count(RiR(**SWITCHES[variant], layers=layers, device="meta", **options)) == expected


@pytest.mark.parametrize("variant", SWITCHES)
def test_parameter_count_of_the_thin_networks(variant):
    stem, head = 27 * 16 + 32, 64 * 10 + 20
    stages = [(16, 16, 4), (16, 32, 6), (32, 64, 6)]  # inputs, outputs, layers
    convs = sum(9 * (i * o + (n - 1) * o * o) + 2 * n * o for i, o, n in stages)
    assert count(RiR(**SWITCHES[variant], width=THIN)) == stem + convs + head


def test_names():
    names = list(RiR(width=THIN, layers=reference, shortcut="projection").state_dict())
    assert names[0] == "stem.conv.weight"
    assert "stages.0.1.layers.1.conv_tr.weight" in names
    assert "stages.2.0.layers.0.projection.weight" in names
    assert "stages.2.0.projection.weight" in names
    assert "stages.2.2.layers.1.bn_t.running_var" in names
    assert "head.bn.bias" in names
    assert "head.conv.bias" not in names
    assert not any(name.startswith("stages.0.0.projection") for name in names)  # no shape changes there
    names = list(built("ResNet", shortcut="projection", head="linear").state_dict())
    assert {"stages.1.0.layers.0.conv.weight", "stages.1.0.projection.weight", "head.weight", "head.bias"} <= set(names)


def conv_bn(state, name, x, training, stride=1, residual=0.0):
    """A unit's convolution and norm, by its weights; the statistics stay as they are."""
    weight = state[f"{name}.conv.weight"]
    z = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    statistics = (None, None) if training else (state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"])
    return F.batch_norm(z, *statistics, state[f"{name}.bn.weight"], state[f"{name}.bn.bias"], training) + residual


def plain_by_hand(model, x, *, shortcut, head, training):
    """A CNN (shortcut None) or a ResNet from nothing but F.conv2d and F.batch_norm."""
    state = model.state_dict()
    x = F.relu(conv_bn(state, "stem", x, training))
    for stage, blocks in enumerate(SMALL["depth"]):
        for block in range(blocks):
            name, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
            residual = 0.0
            if f"{name}.projection.weight" in state:
                residual = F.conv2d(x, state[f"{name}.projection.weight"], stride=stride)
            elif shortcut:
                missing = SMALL["width"][stage] - x.shape[1]
                residual = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, missing))
            x = F.relu(conv_bn(state, f"{name}.layers.0", x, training, stride))
            x = F.relu(conv_bn(state, f"{name}.layers.1", x, training, residual=residual))
    if head == "linear":
        return F.linear(x.mean((2, 3)), state["head.weight"], state["head.bias"])
    return conv_bn(state, "head", x, training).mean((2, 3))


@pytest.mark.parametrize("layers", [reference, rir_kernels], ids=["reference", "package"])
@pytest.mark.parametrize("head", ["conv", "linear"])
@pytest.mark.parametrize(("variant", "shortcut"), [("CNN", "pad"), ("ResNet", "pad"), ("ResNet", "projection")])
def test_plain_networks_are_their_formulas(layers, variant, shortcut, head):
    model = built(variant, shortcut=shortcut, head=head, layers=layers)
    x = torch.randn(4, 3, 9, 11, dtype=torch.float64)
    for training in (False, True):  # eval first: training moves the statistics
        joins = None if variant == "CNN" else shortcut
        expected = plain_by_hand(model, x, shortcut=joins, head=head, training=training)
        # fp64 through 10 norms, each may enlarge a rounding error of 1e-16 a few times
        torch.testing.assert_close(model.train(training)(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("variant", "outer"),
    [("ResNet Init", {}), ("RiR", {}), ("RiR", {"outer_at": "post_act"}), ("RiR", {"outer_streams": "both"})],
)
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_packed_networks_are_the_reference_ones(variant, shortcut, outer):
    packed = built(variant, shortcut=shortcut, **outer)
    naive = built(variant, shortcut=shortcut, layers=reference, **outer)
    naive.stem.load_state_dict(packed.stem.state_dict())
    naive.head.load_state_dict(packed.head.state_dict())
    for ours, theirs in zip(packed.blocks(), naive.blocks(), strict=True):
        theirs.load_state_dict(ours.to_reference().state_dict())
    x = torch.randn(4, 3, 9, 11, dtype=torch.float64)
    for training in (False, True):
        # fp64 through 10 norms, each may enlarge a rounding error of 1e-16 a few times
        torch.testing.assert_close(packed.train(training)(x), naive.train(training)(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["ResNet Init", "RiR"])
def test_shortcuts_are_wired_by_default(variant):
    """Layer by layer: the inner shortcut on every residual stream, the outer one before the block's last norm."""
    model = built(variant, layers=reference, depth=(1, 1, 0)).eval()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    y = F.relu(model.stem.bn(model.stem.conv(x)))
    r, t = y[:, :4], y[:, 4:]
    for block, stride, pad in ((model.stages[0][0], 1, 0), (model.stages[1][0], 2, 2)):
        outer = F.pad(r[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, pad))
        for layer in block.layers:
            inner = outer if layer is block.layers[0] else r  # both begin at the block's input
            sum_r, sum_t = layer.conv_rr(r) + layer.conv_tr(t) + inner, layer.conv_rt(r) + layer.conv_tt(t)
            if variant == "RiR" and layer is block.layers[-1]:
                sum_r = sum_r + outer
            r, t = F.relu(layer.bn_r(sum_r)), F.relu(layer.bn_t(sum_t))
    y = model.head.bn(model.head.conv(torch.cat([r, t], dim=1))).mean((2, 3))
    # the same operations in the same order, apart from the pooling
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("variant", "options"),
    [("CNN", {}), ("ResNet", {"shortcut": "projection"}), ("ResNet Init", {"shortcut": "projection"}),
     ("RiR", {"shortcut": "projection", "outer_streams": "both"})],
)  # fmt: skip
def test_every_parameter_learns(variant, options):
    """One step at a small rate lowers the loss as far as the gradient promises."""
    torch.manual_seed(0)
    model = RiR(**SWITCHES[variant], width=THIN, depth=(1, 1, 1), layers=reference, dtype=torch.float64, **options)
    x, target = torch.randn(8, 3, 9, 9, dtype=torch.float64), torch.arange(8)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    rate = 1e-6
    promised = rate * sum((g**2).sum() for g in gradients)
    with torch.no_grad():
        for p in model.parameters():
            p -= rate * p.grad
        gained = loss - F.cross_entropy(model(x), target)
    # the second-order term is of the order of the rate, times a curvature that can be large where a variance is small
    assert gained.item() == pytest.approx(promised.item(), rel=1e-2)


@pytest.mark.parametrize("variant", SWITCHES)
def test_impl_and_factory_reach_every_unit(variant):
    seen = []

    def recorded(cls):
        def build(*args, impl, **kwargs):
            seen.append((cls.__name__, impl, kwargs["dtype"]))
            return cls(*args, **kwargs)

        return build

    layers = SimpleNamespace(RiRBlock=recorded(reference.RiRBlock), ConvBNAct=recorded(reference.ConvBNAct))
    model = RiR(**SWITCHES[variant], width=THIN, layers=layers, impl="torch", dtype=torch.float64, shortcut="pad")
    inner = ["RiRBlock"] * 8 if SWITCHES[variant]["inner_shortcut"] else ["ConvBNAct"] * 16
    assert seen == [(name, "torch", torch.float64) for name in ["ConvBNAct", *inner, "ConvBNAct"]]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with pytest.raises(TypeError, match="impl"):
        RiR(**SWITCHES[variant], layers=reference, impl="torch")  # the reference has no other implementations


@pytest.mark.parametrize("variant", SWITCHES)
def test_convolutions_start_from_he_normal(variant):
    torch.manual_seed(0)
    model = RiR(**SWITCHES[variant], width=(32, 48), depth=(1, 1), num_classes=100)
    for name, weight in model.named_parameters():
        if weight.dim() == 4:
            # the sample variance of n normals has the relative deviation sqrt(2 / n); 5 of them, and the seed is fixed
            fan_in = weight[0].numel()
            assert weight.var().item() == pytest.approx(2 / fan_in, rel=5 * (2 / weight.numel()) ** 0.5), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": (16, 32)}, "one entry per stage"),
        ({"width": (), "depth": ()}, "one entry per stage"),
        ({"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ({"layers_per_block": 0}, "layers_per_block must be a positive int, got 0"),
        ({"head": "mlp"}, "head must be one of 'conv', 'linear', got 'mlp'"),
        ({"outer_shortcut": "none"}, "outer_shortcut must be True or False, got 'none'"),
        ({"outer_at": "none"}, "outer_at must be one of 'pre_norm', 'post_act', got 'none'"),
        ({"shortcut": "none"}, "shortcut must be one of 'pad', 'projection', got 'none'"),
        ({"outer_shortcut": False, "outer_at": "pre_norm"}, "ResNet Init takes no option outer_at"),
        ({"inner_shortcut": False, "residual_fraction": 0.5}, "ResNet takes no option residual_fraction"),
        ({"num_layers": 2}, "RiR takes no option num_layers; .* residual_fraction, outer_at, outer_streams"),
        (SWITCHES["CNN"] | {"shortcut": "projection"}, "a CNN has no shortcuts"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RiR(**options)
