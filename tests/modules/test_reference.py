"""The reference against the formulas, written out in fp64: the convolution tap by tap, the norm from its moments.

Tolerance, where none is named: outputs of order one, out of sums of at most a few hundred fp64 terms and one norm,
carry rounding errors near 1e-14; 1e-11 leaves room for the division by a small deviation, and a mistake is above 1e-3.
"""

import math

import pytest
import torch
from torch import nn

from rir_kernels import reference
from rir_kernels.common.streams import pack_weight
from tests.support.helpers import double_precision, pair  # noqa: F401 (an autouse fixture)

CLOSE = {"rtol": 1e-11, "atol": 1e-11}


# the formulas


def conv_formula(x, weight, stride=1, padding=0, dilation=1, groups=1):
    (sh, sw), (ph, pw), (dh, dw) = pair(stride), pair(padding), pair(dilation)
    n, c_in, h, w = x.shape
    c_out, c_group, kh, kw = weight.shape
    padded = x.new_zeros(n, c_in, h + 2 * ph, w + 2 * pw)
    padded[:, :, ph : ph + h, pw : pw + w] = x
    h_out, w_out = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    y = x.new_zeros(n, c_out, h_out, w_out)
    for i in range(kh):
        for j in range(kw):
            tap = padded[:, :, i * dh : i * dh + sh * (h_out - 1) + 1 : sh, j * dw : j * dw + sw * (w_out - 1) + 1 : sw]
            for g in range(groups):
                outputs = slice(g * c_out // groups, (g + 1) * c_out // groups)
                inputs = tap[:, g * c_group : (g + 1) * c_group]
                y[:, outputs] += torch.einsum("oc,nchw->nohw", weight[outputs, :, i, j], inputs)
    return y


def norm_formula(z, scale, shift, eps=1e-5, mean=None, var=None):
    if mean is None:
        mean = z.mean((0, 2, 3))
        var = ((z - mean[:, None, None]) ** 2).mean((0, 2, 3))
    normed = (z - mean[:, None, None]) / (var[:, None, None] + eps).sqrt()
    return normed * scale[:, None, None] + shift[:, None, None]


def padded_to(r, channels, stride):
    y = r.new_zeros(r.shape[0], channels, math.ceil(r.shape[2] / stride), math.ceil(r.shape[3] / stride))
    kept = min(channels, r.shape[1])
    y[:, :kept] = r[:, :kept, ::stride, ::stride]
    return y


def shortcut_formula(stream, channels, stride, projection):
    if projection is None:
        return padded_to(stream, channels, stride)
    return torch.einsum("oc,nchw->nohw", projection.weight[:, :, 0, 0], stream[:, :, ::stride, ::stride])


def layer_sums(layer, r, t, branch_scale=1.0):
    """[z_r | z_t] before the norm, without an outer shortcut."""
    k, s = layer.kernel_size, layer.stride
    out_t = layer.out_channels - layer.out_residual
    size = (r.shape[0], -(-r.shape[2] // s), -(-r.shape[3] // s))
    z_r = r.new_zeros(size[0], layer.out_residual, *size[1:])
    z_t = r.new_zeros(size[0], out_t, *size[1:])
    for z, conv, stream in (
        (z_r, layer.conv_rr, r),
        (z_r, layer.conv_tr, t),
        (z_t, layer.conv_rt, r),
        (z_t, layer.conv_tt, t),
    ):
        assert (conv is None) == (z.shape[1] == 0 or stream.shape[1] == 0)
        if conv is not None:
            z += branch_scale * conv_formula(stream, conv.weight, s, k // 2)
    if layer.shortcut != "none":
        z_r += shortcut_formula(r, layer.out_residual, s, layer.projection)
    return torch.cat([z_r, z_t], 1)


def layer_norm_act(layer, z, eps=1e-5):
    norms = [bn for bn in (layer.bn_r, layer.bn_t) if bn is not None]
    y = norm_formula(z, torch.cat([bn.weight for bn in norms]), torch.cat([bn.bias for bn in norms]), eps)
    return y.clamp(min=0)


def scrambled(module):
    """Norm parameters that are not ones and zeros, so that none can be forgotten."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    return module


# conv_bn_act


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "activation": None},
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "bias": True},
        {"padding": 1, "groups": 2, "eps": 0.1},
        {"padding": 1, "residual": (6,), "branch_scale": 0.3, "residual_at": "pre_norm"},
        {"padding": 1, "residual": (6,), "branch_scale": 0.3, "bias": True, "residual_at": "post_norm"},
        {"padding": 1, "residual": (2,), "branch_scale": -2, "stride": 2, "bias": True, "residual_at": "pre_norm"},
        {"padding": 1, "residual": (2,), "residual_at": "post_norm", "activation": None},
        {"padding": 1, "residual": (2, 5), "branch_scale": 0.7, "residual_at": "pre_norm"},
        {"padding": 1, "residual": (4, 1), "branch_scale": 0.7, "residual_at": "post_norm"},
        {"padding": 1, "branch_scale": 0.5, "residual_at": "post_norm"},  # the scale does not wait for a residual
    ],
)
def test_conv_bn_act_is_the_formula(options, training):
    options = dict(options)
    widths = options.pop("residual", ())
    with_bias = options.pop("bias", False)
    x, weight = torch.randn(3, 4, 7, 6), torch.randn(6, 4 // options.get("groups", 1), 3, 3)
    scale, shift, bias = torch.randn(6), torch.randn(6), torch.randn(6)
    mean, var = torch.randn(6), torch.rand(6) + 0.5
    geometry = {k: options[k] for k in ("stride", "padding", "dilation", "groups") if k in options}

    z = conv_formula(x, weight, **geometry)
    if with_bias:
        z = z + bias[:, None, None]
    residuals = tuple(torch.randn(3, width, *z.shape[2:]) for width in widths)

    def joined(y):
        y = y * options.get("branch_scale", 1.0)
        for residual in residuals:
            y[:, : residual.shape[1]] += residual
        return y

    at = options.get("residual_at", "pre_norm")
    z = joined(z) if at == "pre_norm" else z
    statistics = {} if training else {"mean": mean, "var": var}
    expected = norm_formula(z, scale, shift, options.get("eps", 1e-5), **statistics)
    expected = joined(expected) if at == "post_norm" else expected
    expected = expected.clamp(min=0) if options.get("activation", "relu") else expected

    running_mean, running_var = mean.clone(), var.clone()
    y = reference.conv_bn_act(
        x,
        weight,
        bn_weight=scale,
        bn_bias=shift,
        running_mean=running_mean,
        running_var=running_var,
        bias=bias if with_bias else None,
        residual=None if not residuals else residuals[0] if len(residuals) == 1 else residuals,
        training=training,
        momentum=0.3,
        **options,
    )
    torch.testing.assert_close(y, expected, **CLOSE)

    if training:  # torch's rule: the running variance takes the unbiased one
        count = z.numel() / 6
        unbiased = z.var((0, 2, 3), correction=0) * count / (count - 1)
        torch.testing.assert_close(running_mean, 0.7 * mean + 0.3 * z.mean((0, 2, 3)), **CLOSE)
        torch.testing.assert_close(running_var, 0.7 * var + 0.3 * unbiased, **CLOSE)
    else:
        assert torch.equal(running_mean, mean)
        assert torch.equal(running_var, var)


def test_conv_bn_act_without_norm_parameters():
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    expected = norm_formula(conv_formula(x, weight), torch.ones(4), torch.zeros(4)).clamp(min=0)
    torch.testing.assert_close(reference.conv_bn_act(x, weight, training=True), expected, **CLOSE)


@pytest.mark.parametrize("residual_at", ["pre_norm", "post_norm"])
def test_conv_bn_act_gradients(residual_at):
    def function(x, weight, scale, shift, bias, first, second):
        return reference.conv_bn_act(
            x,
            weight,
            bn_weight=scale,
            bn_bias=shift,
            bias=bias,
            residual=(first, second),
            residual_at=residual_at,
            branch_scale=0.5,
            stride=2,
            padding=1,
            training=True,
            activation=None,  # no kink for the finite differences to step over
        )

    shapes = [(2, 3, 4, 3), (4, 3, 3, 3), (4,), (4,), (4,), (2, 2, 2, 2), (2, 4, 2, 2)]
    assert torch.autograd.gradcheck(function, [torch.randn(s, requires_grad=True) for s in shapes], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_activations_beside_fp32_norm_parameters(dtype):
    x, weight, residual = (torch.randn(s).to(dtype) for s in ((4, 8, 6, 6), (8, 8, 3, 3), (4, 4, 6, 6)))
    norm = {name: torch.rand(8) + 0.5 for name in ("bn_weight", "bn_bias", "running_mean", "running_var")}
    options = {"residual_at": "pre_norm", "padding": 1, "training": True}
    golden = reference.conv_bn_act(x.double(), weight.double(), **norm, residual=residual.double(), **options)
    norm = {name: p.float() for name, p in norm.items()}
    y = reference.conv_bn_act(x, weight, **norm, residual=residual, **options)
    assert y.dtype == dtype
    # z, the sum and y are each rounded to dtype (eps / 2 of a value up to max|golden|, scale included): 2 eps covers it
    budget = 2 * torch.finfo(dtype).eps * golden.abs().max()
    assert (y.double() - golden).abs().max() <= budget


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual_at": "after"}, ValueError, "residual_at must be one of 'pre_norm', 'post_norm', got 'after'"),
        ({"activation": "gelu"}, ValueError, "activation must be one of 'relu', None, got 'gelu'"),
        ({"residual": torch.zeros(2, 5, 3, 3, dtype=torch.float64)}, ValueError, "C_res <= C_out"),
        ({"residual": torch.zeros(1, 4, 3, 3, dtype=torch.float64)}, ValueError, "C_res <= C_out"),  # no broadcasting
        ({"residual": torch.zeros(2, 4, 3, 3, dtype=torch.float32)}, TypeError, "share a dtype"),
        ({"bias": torch.zeros(4, dtype=torch.float32)}, TypeError, "share a dtype"),
        ({"x": torch.zeros(2, 3, 5, 5, dtype=torch.int64)}, TypeError, "must be floating"),
    ],
)
def test_conv_bn_act_refuses(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 5, 5), "weight": torch.zeros(4, 3, 3, 3), "training": True}
    arguments |= {"residual_at": "pre_norm"} | change
    with pytest.raises(error, match=message):
        reference.conv_bn_act(**arguments)


def test_eval_without_statistics_is_torchs_error():
    with pytest.raises((RuntimeError, ValueError)) as torchs:
        nn.functional.batch_norm(torch.zeros(2, 4, 3, 3), None, None, training=False)
    with pytest.raises(torchs.type) as ours:
        reference.conv_bn_act(torch.zeros(2, 3, 5, 5), torch.zeros(4, 3, 3, 3))
    assert str(ours.value) == str(torchs.value)


# RiRLayer


@pytest.mark.parametrize("fraction", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("shortcut", ["pad", "projection", "none"])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "stride", "kernel_size", "size"),
    [(6, 6, 1, 3, (5, 7)), (4, 10, 2, 3, (7, 5)), (9, 5, 2, 1, (6, 6)), (5, 1, 1, 5, (4, 3)), (1, 5, 3, 3, (7, 8))],
)
def test_layer_is_the_formula(fraction, shortcut, in_channels, out_channels, stride, kernel_size, size):
    layer = scrambled(
        reference.RiRLayer(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            residual_fraction=fraction,
            shortcut=shortcut,
            branch_scale=0.7,
            eps=1e-3,
        )
    )
    x = torch.randn(3, in_channels, *size)
    c = layer.in_residual
    assert c == round(fraction * in_channels)
    changes = stride != 1 or c != layer.out_residual
    assert (layer.projection is not None) == (shortcut == "projection" and changes and c > 0 and layer.out_residual > 0)

    expected = layer_norm_act(layer, layer_sums(layer, x[:, :c], x[:, c:], 0.7), 1e-3)
    y = layer(x)
    torch.testing.assert_close(y, expected, **CLOSE)

    r, t = layer(x[:, :c] if c else None, x[:, c:] if c < in_channels else None)
    assert torch.equal(torch.cat([r, t], 1), y)
    r, t = layer(x[:, :c], x[:, c:])  # an absent stream as a tensor without channels
    assert torch.equal(torch.cat([r, t], 1), y)


@pytest.mark.parametrize("width", [1, 3, 4, 6])  # within r', all of r', across, all
def test_outer_joins_the_sum_before_the_norm(width):
    layer = scrambled(reference.RiRLayer(4, 6, stride=2, branch_scale=0.5))
    x, outer = torch.randn(3, 4, 5, 5), torch.randn(3, width, 3, 3)
    z = layer_sums(layer, x[:, :2], x[:, 2:], 0.5)
    z[:, :width] += outer
    torch.testing.assert_close(layer(x, outer=outer), layer_norm_act(layer, z), **CLOSE)


def test_layer_is_one_packed_convolution():
    layer = scrambled(reference.RiRLayer(6, 10, stride=2, branch_scale=0.8, residual_fraction=0.3))
    x = torch.randn(3, 6, 7, 7)
    weights = (conv.weight for conv in (layer.conv_rr, layer.conv_rt, layer.conv_tr, layer.conv_tt))
    norm = {
        f"bn_{name}": torch.cat([getattr(bn, name) for bn in (layer.bn_r, layer.bn_t)]) for name in ("weight", "bias")
    }
    packed = reference.conv_bn_act(
        x,
        pack_weight(*weights),
        **norm,
        residual=padded_to(x[:, :2], 3, 2),
        residual_at="pre_norm",
        branch_scale=0.8,
        stride=2,
        padding=1,
        training=True,
    )
    torch.testing.assert_close(layer(x), packed, **CLOSE)


def test_running_statistics_of_both_streams():
    layer = reference.RiRLayer(4, 6, momentum=0.2)
    x = torch.randn(3, 4, 5, 5)
    z = layer_sums(layer, x[:, :2], x[:, 2:])
    layer(x)
    count = 3 * 5 * 5
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    for bn, channels in ((layer.bn_r, slice(0, 3)), (layer.bn_t, slice(3, 6))):
        torch.testing.assert_close(bn.running_mean, 0.2 * mean[channels], **CLOSE)
        torch.testing.assert_close(bn.running_var, 0.8 + 0.2 * var[channels] * count / (count - 1), **CLOSE)
        assert bn.num_batches_tracked == 1

    layer.eval()
    statistics = [
        torch.cat([getattr(bn, n) for bn in (layer.bn_r, layer.bn_t)]) for n in ("running_mean", "running_var")
    ]
    expected = norm_formula(z, torch.ones(6), torch.zeros(6), 1e-5, *statistics).clamp(min=0)
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    assert layer.bn_r.num_batches_tracked == 1


def test_an_empty_batch_leaves_the_statistics():
    layer = reference.RiRLayer(4, 6, stride=2)
    assert layer(torch.zeros(0, 4, 5, 5)).shape == (0, 6, 3, 3)
    assert torch.equal(layer.bn_r.running_mean, torch.zeros(3))
    assert torch.equal(layer.bn_t.running_var, torch.ones(3))


@pytest.mark.parametrize("resize", [False, True])
def test_layer_is_pytorchcvs_unit(resize):
    """An implementation by others, with the equation's own names for the convolutions."""
    rir_cifar = pytest.importorskip("pytorchcv.models.rir_cifar")
    inputs, outputs, stride = (4, 6, 2) if resize else (5, 5, 1)
    unit = scrambled(rir_cifar.RiRUnit(inputs, outputs, stride))
    layer = reference.RiRLayer(2 * inputs, 2 * outputs, stride=stride, shortcut="projection")
    for ours, theirs in (
        ("conv_rr", unit.res_pass_conv),
        ("conv_rt", unit.res_cross_conv),
        ("conv_tr", unit.trans_cross_conv),
        ("conv_tt", unit.trans_pass_conv),
        ("bn_r", unit.res_postactiv.bn),
        ("bn_t", unit.trans_postactiv.bn),
        ("projection", unit.identity_conv if resize else None),
    ):
        if theirs is None:
            assert getattr(layer, ours) is None
        else:
            getattr(layer, ours).load_state_dict(theirs.state_dict())
    r, t = torch.randn(3, inputs, 7, 5), torch.randn(3, inputs, 7, 5)
    for mode in (True, False):
        for ours, theirs in zip(layer.train(mode)(r, t), unit.train(mode)(r, t), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


def test_without_a_residual_stream_it_is_a_plain_cnn_layer():
    layer, plain = reference.RiRLayer(4, 6, residual_fraction=0), reference.ConvBNAct(4, 6, 3)
    plain.conv.load_state_dict(layer.conv_tt.state_dict())
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(layer(x), plain(x))


def test_initial_variance_is_he_with_the_packed_fan_in():
    layer = reference.RiRLayer(48, 96, kernel_size=3, stride=2, shortcut="projection", residual_fraction=0.25)
    for conv in (layer.conv_rr, layer.conv_rt, layer.conv_tr, layer.conv_tt):
        weight = conv.weight
        # the sample variance of n normals has the relative deviation sqrt(2 / n); 5 of them, and the seed is fixed
        assert weight.var().item() == pytest.approx(2 / (48 * 9), rel=5 * math.sqrt(2 / weight.numel()))
    projection = layer.projection.weight
    assert projection.var().item() == pytest.approx(2 / 12, rel=5 * math.sqrt(2 / projection.numel()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fraction", [0, 0.5, 1])
def test_memory_format_is_kept(memory_format, fraction):
    block = reference.RiRBlock(4, 6, stride=2, residual_fraction=fraction, outer_streams="both")
    x = torch.randn(3, 4, 7, 5)
    y = block(x.contiguous(memory_format=memory_format))
    assert y.is_contiguous(memory_format=memory_format)
    # another memory format may sum in another order, hence not the same bits
    torch.testing.assert_close(y, block(x), **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels must be a positive int, got 0"),
        ({"out_channels": 4.0}, "out_channels must be a positive int, got 4.0"),
        ({"kernel_size": 2}, "kernel_size must be an odd positive int, got 2"),
        ({"kernel_size": (3, 3)}, "kernel_size must be an odd"),
        ({"stride": 0}, "stride must be a positive int"),
        ({"residual_fraction": 1.5}, "residual_fraction must be a number within"),
        ({"shortcut": "identity"}, "shortcut must be one of 'pad', 'projection', 'none', got 'identity'"),
        ({"branch_scale": math.inf}, "branch_scale must be a finite number"),
        ({"eps": 0}, "eps must be a positive number"),
        ({"eps": math.nan}, "eps must be a positive number"),
        ({"momentum": "0.1"}, "momentum must be a number, or None"),
        ({"num_layers": 0}, "num_layers must be a positive int"),
        ({"outer_shortcut": "pre"}, "outer_shortcut must be one of 'pre_norm', 'post_act', 'none'"),
        ({"outer_streams": "transient"}, "outer_streams must be one of 'residual', 'both'"),
    ],
)
def test_constructors_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        reference.RiRBlock(**{"in_channels": 4, "out_channels": 6, **options})


@pytest.mark.parametrize(
    ("streams", "outer", "error", "message"),
    [
        (((2, 5, 3, 3),), None, ValueError, r"x must have the shape \(N, 4, H, W\)"),
        (((2, 2, 3, 3), (2, 3, 3, 3)), None, ValueError, "t must have the shape"),
        (((2, 4, 3, 3),), (2, 7, 3, 3), ValueError, "outer must be"),
        (((2, 4, 3, 3),), (2, 1, 2, 2), ValueError, "residual must have the shape"),
    ],
)
def test_layer_refuses_shapes(streams, outer, error, message):
    layer = reference.RiRLayer(4, 6)
    with pytest.raises(error, match=message):
        layer(*map(torch.zeros, streams), outer=None if outer is None else torch.zeros(outer))


def test_layers_refuse_unlike_dtypes():
    x = torch.zeros(2, 4, 3, 3)
    with pytest.raises(TypeError, match="share a dtype"):
        reference.RiRLayer(4, 6)(x.float())
    with pytest.raises(TypeError, match="share a dtype"):
        reference.RiRLayer(4, 6)(x[:, :2], x[:, 2:].float())
    with pytest.raises(TypeError, match="share a dtype"):
        reference.ConvBNAct(4, 6, 3)(x, torch.zeros(2, 6, 3, 3, dtype=torch.float32))


# RiRBlock


@pytest.mark.parametrize("outer_shortcut", ["pre_norm", "post_act", "none"])
@pytest.mark.parametrize("outer_streams", ["residual", "both"])
@pytest.mark.parametrize("shortcut", ["pad", "projection", "none"])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "stride", "fraction", "num_layers"),
    [(6, 6, 1, 0.5, 2), (4, 8, 2, 0.25, 2), (8, 4, 1, 0.5, 3), (4, 6, 2, 0, 2), (4, 6, 2, 1, 1), (1, 4, 2, 0.5, 2)],
)
def test_block_is_the_formula(
    outer_shortcut, outer_streams, shortcut, in_channels, out_channels, stride, fraction, num_layers
):
    block = scrambled(
        reference.RiRBlock(
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
        )
    )
    assert [layer.stride for layer in block.layers] == [stride] + [1] * (num_layers - 1)
    in_r, out_r = block.layers[0].in_residual, block.layers[-1].out_residual
    x = torch.randn(3, in_channels, 5, 7)

    # a stream's projection is there where that stream is in the outer shortcut, changes shape, and has both ends
    for name, inputs, outputs, wanted in (
        ("projection", in_r, out_r, True),
        ("projection_t", in_channels - in_r, out_channels - out_r, outer_streams == "both"),
    ):
        changes = inputs > 0 and outputs > 0 and (stride != 1 or inputs != outputs)
        wanted = wanted and changes and outer_shortcut != "none" and shortcut == "projection"
        assert (getattr(block, name) is not None) == wanted

    outer = shortcut_formula(x[:, :in_r], out_r, stride, block.projection)
    if outer_streams == "both":
        outer_t = shortcut_formula(x[:, in_r:], out_channels - out_r, stride, block.projection_t)
        outer = torch.cat([outer, outer_t], 1)

    y = x
    for layer in block.layers:
        c = layer.in_residual
        z = layer_sums(layer, y[:, :c], y[:, c:], 0.6)
        if outer_shortcut == "pre_norm" and layer is block.layers[-1]:
            z[:, : outer.shape[1]] += outer
        y = layer_norm_act(layer, z, 1e-3)
    if outer_shortcut == "post_act":
        y[:, : outer.shape[1]] += outer

    packed = block(x)
    torch.testing.assert_close(packed, y, **CLOSE)
    assert torch.equal(torch.cat(block(x[:, :in_r], x[:, in_r:]), 1), packed)


def test_block_gradients():
    """Through every path at once: both shortcuts, projections, both streams. The loss must not sit on a ReLU's kink."""
    block = reference.RiRBlock(4, 6, stride=2, shortcut="projection", outer_streams="both")
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    names, parameters = zip(*block.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


# ConvBNAct


@pytest.mark.parametrize("residual_at", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("activation", ["relu", None])
def test_conv_bn_act_module_is_the_formula(residual_at, activation):
    unit = scrambled(
        reference.ConvBNAct(
            4,
            6,
            3,
            stride=2,
            groups=2,
            bias=True,
            residual_at=residual_at,
            branch_scale=0.4,
            activation=activation,
            eps=1e-3,
            momentum=None,
        )
    )
    x, residual = torch.randn(3, 4, 7, 5), torch.randn(3, 2, 4, 3)
    z = conv_formula(x, unit.conv.weight, 2, 1, groups=2) + unit.conv.bias[:, None, None]
    if residual_at == "pre_norm":
        z = 0.4 * z
        z[:, :2] += residual
    mean = z.mean((0, 2, 3))
    y = norm_formula(z, unit.bn.weight, unit.bn.bias, 1e-3)
    if residual_at == "post_norm":
        y = 0.4 * y
        y[:, :2] += residual
    torch.testing.assert_close(unit(x, residual), y.clamp(min=0) if activation else y, **CLOSE)
    # momentum None is the cumulative average: after one batch, that batch alone
    torch.testing.assert_close(unit.bn.running_mean, mean, **CLOSE)


@pytest.mark.parametrize(
    ("kernel_size", "padding", "expected"),
    [(3, None, 1), (1, None, 0), ((5, 3), None, (2, 1)), (3, 0, 0), (4, None, 2)],
)
def test_conv_bn_act_module_pads_by_half_the_kernel(kernel_size, padding, expected):
    unit = reference.ConvBNAct(2, 3, kernel_size, padding=padding)
    x = torch.randn(2, 2, 7, 6)
    y = norm_formula(conv_formula(x, unit.conv.weight, 1, expected), torch.ones(3), torch.zeros(3)).clamp(min=0)
    torch.testing.assert_close(unit(x), y, **CLOSE)


def test_conv_bn_act_module_starts_as_torchs_own():
    """So that it can take the place of Conv2d and BatchNorm2d, state dict and seed included."""
    torch.manual_seed(1)
    unit = reference.ConvBNAct(4, 6, 3, stride=2)
    torch.manual_seed(1)
    conv, bn = nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
    theirs = {f"conv.{k}": v for k, v in conv.state_dict().items()} | {f"bn.{k}": v for k, v in bn.state_dict().items()}
    ours = unit.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be an int >= 1 or a pair of such, got 0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be"),
        ({"padding": -1}, "padding must be an int >= 0"),
        ({"stride": (1, 0)}, "stride must be"),
        ({"residual_at": None}, "residual_at must be one of"),
        ({"activation": "ReLU"}, "activation must be one of 'relu', None"),
    ],
)
def test_conv_bn_act_module_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        reference.ConvBNAct(**{"in_channels": 2, "out_channels": 3, "kernel_size": 3, **options})
