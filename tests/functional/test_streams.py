"""Two streams packed into one tensor, one weight and one shortcut: exact, so every comparison is bitwise."""

import math

import pytest
import torch
import torch.nn.functional as F

from rir_kernels.common.streams import (
    PACKED,
    add_to_first_channels,
    as_streams,
    init_std,
    join_streams,
    needs_projection,
    pack_weight,
    pad_shortcut,
    split_channels,
    unpack_weight,
)


def integers(*shape, seed=0):
    """Small integers in fp32: every product and partial sum is exact, whatever the order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(
    ("channels", "fraction", "expected"),
    [
        (96, 0.5, (48, 48)),
        (8, 0.25, (2, 6)),
        (8, 0, (0, 8)),
        (8, 1, (8, 0)),
        (1, 0.5, (0, 1)),  # round(0.5) is 0, round(1.5) is 2, round(2.5) is 2: halves go to the even number
        (3, 0.5, (2, 1)),
        (5, 0.5, (2, 3)),
        (10, 1 / 3, (3, 7)),
    ],
)
def test_split_channels(channels, fraction, expected):
    assert split_channels(channels, fraction) == expected


@pytest.mark.parametrize("fraction", [-0.01, 1.01, math.nan, "0.5", None, True])
def test_split_channels_refuses_the_fraction(fraction):
    with pytest.raises(ValueError, match=r"residual_fraction .*\[0, 1\], got"):
        split_channels(8, fraction)


@pytest.mark.parametrize("channels", [0, -2, 2.0, "8", True])
def test_split_channels_refuses_the_channels(channels):
    with pytest.raises(ValueError, match=r"channels must be a positive int, got"):
        split_channels(channels, 0.5)


@pytest.mark.parametrize("in_streams", [(2, 3), (0, 4), (4, 0)])
@pytest.mark.parametrize("out_streams", [(3, 1), (0, 2), (2, 0)])
@pytest.mark.parametrize("stride", [1, 2])
def test_packed_convolution_is_the_four_convolutions(in_streams, out_streams, stride):
    (in_r, in_t), (out_r, out_t) = in_streams, out_streams
    r, t = integers(2, in_r, 7, 5, seed=1), integers(2, in_t, 7, 5, seed=2)

    def weight(outputs, inputs, seed):
        return integers(outputs, inputs, 3, 3, seed=seed) if outputs and inputs else None

    rr, rt, tr, tt = weight(out_r, in_r, 3), weight(out_t, in_r, 4), weight(out_r, in_t, 5), weight(out_t, in_t, 6)
    packed = pack_weight(rr, rt, tr, tt)
    y = F.conv2d(torch.cat([r, t], 1), packed, stride=stride, padding=1)

    for start, outputs, terms in ((0, out_r, ((rr, r), (tr, t))), (out_r, out_t, ((rt, r), (tt, t)))):
        if outputs:
            expected = sum(F.conv2d(s, w, stride=stride, padding=1) for w, s in terms if w is not None)
            assert torch.equal(y[:, start : start + outputs], expected)

    for block, given in zip(unpack_weight(packed, in_r, out_r), (rr, rt, tr, tt), strict=True):
        assert block is None if given is None else torch.equal(block, given)


def test_unpacked_blocks_are_views():
    weight = torch.zeros(3, 5, 1, 1)
    for value, block in enumerate(unpack_weight(weight, 2, 1), start=1):
        block.fill_(value)  # rr 1, rt 2, tr 3, tt 4
    assert weight[:, :, 0, 0].tolist() == [[1, 1, 3, 3, 3], [2, 2, 4, 4, 4], [2, 2, 4, 4, 4]]


def test_pack_weight_passes_gradients():
    blocks = [torch.zeros(o, i, 1, 1, requires_grad=True) for o, i in ((1, 2), (2, 2), (1, 3), (2, 3))]  # rr rt tr tt
    scale = torch.arange(15.0).reshape(3, 5, 1, 1)
    (pack_weight(*blocks) * scale).sum().backward()
    for block, expected in zip(blocks, unpack_weight(scale, 2, 1), strict=True):
        assert torch.equal(block.grad, expected)


@pytest.mark.parametrize(
    "blocks",
    [
        (None, None, None, None),
        (torch.zeros(2, 2, 3, 3), None, None, torch.zeros(2, 2, 3, 3)),  # streams that are there, their crossing is not
        (torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 3, 3), None),
        (torch.zeros(2, 2, 3, 3), torch.zeros(2, 3, 3, 3), None, None),  # two widths of r
        (torch.zeros(2, 2, 3, 3), None, torch.zeros(3, 2, 3, 3), None),  # two widths of r'
        (torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 1, 1), None, None),
    ],
)
def test_pack_weight_refuses(blocks):
    with pytest.raises(ValueError, match="got rr"):
        pack_weight(*blocks)


@pytest.mark.parametrize("residuals", [(6, 1), (1, 4), (-1, 1)])
def test_unpack_weight_refuses(residuals):
    with pytest.raises(ValueError, match=r"of 5 inputs and .* of 3 outputs"):
        unpack_weight(torch.zeros(3, 5, 3, 3), *residuals)


@pytest.mark.parametrize("size", [(7, 5), (6, 8), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [0, 2, 3, 7])
def test_pad_shortcut(size, stride, channels):
    r = integers(2, 3, *size)
    expected = torch.zeros(2, channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    for c in range(min(3, channels)):
        for i in range(expected.shape[2]):
            for j in range(expected.shape[3]):
                expected[:, c, i, j] = r[:, c, i * stride, j * stride]
    assert torch.equal(pad_shortcut(r, channels, stride), expected)
    # and it is as large as the convolution beside it
    assert F.conv2d(r, torch.zeros(1, 3, 3, 3), stride=stride, padding=1).shape[2:] == expected.shape[2:]


def test_pad_shortcut_returns_its_input_where_nothing_changes():
    r = integers(2, 3, 4, 4)
    assert pad_shortcut(r, 3, 1) is r


def test_pad_shortcut_of_no_channels_is_zero():
    assert torch.equal(pad_shortcut(torch.zeros(2, 0, 4, 4), 3, 2), torch.zeros(2, 3, 2, 2))


def test_add_to_first_channels():
    y, residual = integers(2, 5, 3, 4, seed=1), integers(2, 2, 3, 4, seed=2)
    before = y.clone()
    out = add_to_first_channels(y, residual)
    assert torch.equal(out[:, :2], y[:, :2] + residual)
    assert torch.equal(out[:, 2:], y[:, 2:])
    assert torch.equal(y, before)  # out of place
    assert torch.equal(add_to_first_channels(y, y), 2 * y)
    assert torch.equal(add_to_first_channels(y, y[:, :0]), y)


@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (1, 2, 3, 4), (2, 2, 1, 1), (2, 2, 4, 3), (2, 3, 4)])
def test_add_to_first_channels_refuses(shape):
    with pytest.raises(ValueError, match=r"C_res <= C_out, got"):
        add_to_first_channels(torch.zeros(2, 5, 3, 4), torch.zeros(shape))


def test_streams_and_back():
    x = integers(2, 5, 3, 4)
    r, t = as_streams(x, PACKED, 2, 5)
    assert torch.equal(r, x[:, :2])
    assert torch.equal(t, x[:, 2:])
    assert as_streams(r, t, 2, 5) == (r, t)
    assert torch.equal(join_streams(r, t), x)

    for absent in (None, x[:, :0]):
        r, t = as_streams(x, absent, 5, 5)
        assert r is x
        assert t.shape == (2, 0, 3, 4)
        assert join_streams(r, t) is x
        r, t = as_streams(absent, x, 0, 5)
        assert t is x
        assert r.shape == (2, 0, 3, 4)
        assert join_streams(r, t) is x


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        ((2, 4, 3, 4), PACKED, r"x must have the shape \(N, 5, H, W\), got \(2, 4, 3, 4\)"),
        ((2, 5, 3), PACKED, r"x must have the shape"),
        ((2, 3, 3, 4), (2, 3, 3, 4), r"r must have the shape \(N, 2, H, W\)"),
        ((2, 2, 3, 4), (2, 2, 3, 4), r"t must have the shape \(N, 3, H, W\)"),
        ((2, 2, 3, 4), None, r"t must have the shape \(N, 3, H, W\), got \(2, 0, 3, 4\)"),
        ((2, 2, 3, 4), (1, 3, 3, 4), r"agree in batch and image size"),
        ((2, 2, 3, 4), (2, 3, 3, 3), r"agree in batch and image size"),
        (None, None, r"both None"),
    ],
)
def test_as_streams_refuses(x, t, message):
    x, t = (torch.zeros(s) if isinstance(s, tuple) else s for s in (x, t))
    with pytest.raises(ValueError, match=message):
        as_streams(x, t, 2, 5)


def test_init_std_is_he_normal():
    weight = torch.empty(4, 6, 3, 3)
    fan_in, _ = torch.nn.init._calculate_fan_in_and_fan_out(weight)
    assert init_std(6, 3) == torch.nn.init.calculate_gain("relu") / math.sqrt(fan_in)


@pytest.mark.parametrize(
    ("shortcut", "inputs", "outputs", "stride", "expected"),
    [
        ("projection", 4, 4, 1, False),
        ("projection", 4, 4, 2, True),
        ("projection", 4, 8, 1, True),
        ("projection", 8, 4, 1, True),
        ("projection", 0, 4, 2, False),
        ("projection", 4, 0, 2, False),
        ("pad", 4, 8, 2, False),
        ("none", 4, 8, 2, False),
    ],
)
def test_needs_projection(shortcut, inputs, outputs, stride, expected):
    assert needs_projection(shortcut, inputs, outputs, stride) is expected
