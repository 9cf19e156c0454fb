"""Inference in integers: sums that are exact, and a network that agrees with the quantized one to the last bit."""

import copy

import pytest
import torch
from torch import nn

import rir_kernels as rir
from models.quantized import exact, integer, quantize_
from models.quantized.integer import IntegerQuantizer, pack, unpack
from models.quantized.layers import QuantizedLinear
from models.quantized.quantizer import Quantizer
from models.rir import RiR
from rir_kernels.common.spec import ConvBNActSpec
from tests.support import quantized_helpers as oracle

# convolutions

GEOMETRIES = {
    "3x3": (ConvBNActSpec(padding=(1, 1)), (5, 6, 3, 3)),
    "stride": (ConvBNActSpec(padding=(1, 1), stride=(2, 2)), (5, 6, 3, 3)),
    "1x1": (ConvBNActSpec(stride=(2, 1)), (5, 6, 1, 1)),
    "uneven": (ConvBNActSpec(padding=(2, 0), dilation=(2, 1), stride=(1, 3)), (5, 6, 3, 2)),
    "groups": (ConvBNActSpec(padding=(1, 1), groups=3), (9, 2, 3, 3)),
    "batch": (ConvBNActSpec(padding=(1, 1)), (16, 6, 3, 3)),
}


def random_codes(shape, low, high, seed=0, dtype=torch.int64):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_accumulators_are_the_integers(name, signed):
    """Floating and integer ones, at 8 bits; from 16 images on NNPACK's Winograd would take over from F.conv2d."""
    spec, shape = GEOMETRIES[name]
    channels = shape[1] * spec.groups
    x = random_codes((20, channels, 9, 8), -127 if signed else 0, 127 if signed else 255)
    weight = random_codes(shape, -127, 127, seed=1)
    expected = oracle.numpy_conv(x, weight, spec)
    bound = exact.largest_sum(shape, 127 if signed else 255, 127)
    assert expected.abs().max() <= bound
    acc = exact.convolve(x.float(), weight.float(), spec, bound)
    assert acc.dtype == torch.float32 and torch.equal(acc.long(), expected)
    acc = exact.convolve_integers(x.to(torch.int8 if signed else torch.uint8), weight.to(torch.int8), spec)
    assert acc.dtype == torch.int32 and torch.equal(acc.long(), expected)


def test_sums_beyond_fp32():
    """The largest codes in every place but one: a sum that is odd and above 2^24 is no fp32 number."""
    x, weight = torch.full((1, 1024, 1, 1), 255), torch.full((1, 1024, 1, 1), 127)
    x[0, 0], weight[0, 0] = 0, 1
    expected = 255 * 127 * 1023
    assert expected % 2 and expected > 2**24
    bound = exact.largest_sum(weight.shape, 255, 127)
    acc = exact.convolve(x.float(), weight.float(), ConvBNActSpec(), bound)
    assert acc.dtype == torch.float64 and acc.item() == expected
    assert exact.convolve_integers(x.byte(), weight.to(torch.int8), ConvBNActSpec()).item() == expected


def test_where_fp32_is_exact():
    assert exact.largest_sum((7, 5, 3, 2), 15, 7) == 5 * 3 * 2 * 15 * 7
    assert exact.accumulator_dtype(2**24 - 1, torch.float32) == torch.float32
    assert exact.accumulator_dtype(2**24, torch.float32) == torch.float64
    assert exact.accumulator_dtype(1, torch.float64) == torch.float64


@pytest.fixture
def short_products():
    """torch may round the factors of fp32 products, to TF32 on a GPU and to bf16 on a CPU."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    assert exact._full_precision()
    backends[0].fp32_precision, backends[1].fp32_precision = "tf32", "bf16"
    yield
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


def test_short_products_are_never_used(short_products, monkeypatch):
    used = []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: used.append(a.dtype) or torch.matmul(a, b))
    assert not exact._full_precision()
    acc = exact.convolve(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), ConvBNActSpec(), 18)
    assert acc.dtype == torch.float32 and acc.item() == 18
    assert used == [torch.float64]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (17, 8, 8), (40, 27, 10), (16, 64, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_int8_product(dtype, sizes):
    """Small weights, so that no CPU saturates within; on a GPU the test below has the large ones."""
    m, k, n = sizes
    low, high = (0, 255) if dtype == torch.uint8 else (-127, 127)
    a, b = random_codes((m, k), low, high), random_codes((k, n), -7, 7, seed=1)
    product = exact.int8_product(a.to(dtype), b.to(torch.int8))
    assert product.dtype == torch.int32 and torch.equal(product.long(), a @ b)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (16, 9, 3), (17, 8, 8)])
def test_int8_product_meets_what_cuda_asks_for(sizes, monkeypatch):
    """More than 16 rows, the other sizes multiples of 8: a CPU would take anything."""
    handed, original = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: handed.append((*a.shape, b.shape[1])) or original(a, b))
    m, k, n = sizes
    exact.int8_product(torch.ones(m, k, dtype=torch.uint8), torch.ones(k, n, dtype=torch.int8))
    assert all(rows > 16 and inner % 8 == columns % 8 == 0 for rows, inner, columns in handed) and len(handed) == 1


@pytest.mark.gpu
@pytest.mark.real_gpu("torch's own products")
@pytest.mark.parametrize("tf32", ["ieee", "tf32"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_accumulators_on_a_gpu(name, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", tf32)
    spec, shape = GEOMETRIES[name]
    x = random_codes((20, shape[1] * spec.groups, 9, 8), 0, 255)
    weight = random_codes(shape, -127, 127, seed=1)
    expected = oracle.numpy_conv(x, weight, spec)
    acc = exact.convolve(x.float().cuda(), weight.float().cuda(), spec, exact.largest_sum(shape, 255, 127))
    assert torch.equal(acc.long().cpu(), expected)
    acc = exact.convolve_integers(x.byte().cuda(), weight.to(torch.int8).cuda(), spec)
    assert torch.equal(acc.long().cpu(), expected)


@pytest.mark.parametrize("shape", [(2, 3), (3, 3, 3, 3), (1,)])
def test_two_codes_to_a_byte(shape):
    codes = random_codes(shape, -8, 7, dtype=torch.int8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and packed.numel() == (codes.numel() + 1) // 2
    assert torch.equal(unpack(packed, shape), codes)
    assert pack(torch.tensor([1, -2, 7], dtype=torch.int8)).tolist() == [1 + 14 * 16, 7]


# networks


def watched(model, x, monkeypatch, name):
    """(output, [(codes of x, codes of the weight, spec, accumulators) of every convolution]) of one call."""
    calls = []
    original = getattr(exact, name)

    def convolve(q_x, q_w, spec, *more):
        acc = original(q_x, q_w, spec, *more)
        calls.append((q_x.detach(), q_w.detach(), spec, acc.detach()))
        return acc

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(exact, name, convolve)
        return model(x), calls


def assert_same_network(quantized, x, monkeypatch):
    """Every code, every accumulator and the logits, bit for bit; the accumulators are those of an int64 convolution."""
    whole = integer(quantized)
    expected, floating = watched(quantized, x, monkeypatch, "convolve")
    y, integers = watched(whole, x, monkeypatch, "convolve_integers")
    assert len(floating) == len(integers) == sum(isinstance(m, Quantizer) for m in quantized.modules())
    seen = 0
    for (fx, fw, spec, facc), (ix, iw, _, iacc) in zip(floating, integers, strict=True):
        assert ix.dtype in (torch.uint8, torch.int8) and iw.dtype == torch.int8 and iacc.dtype == torch.int32
        assert torch.equal(fx, ix.to(fx)) and torch.equal(fw, iw.to(fw))
        assert torch.equal(iacc.long(), oracle.numpy_conv(ix, iw, spec))
        assert torch.equal(facc.long(), iacc.long())
        seen += ix.unique().numel() > 3
    assert seen > len(integers) / 2  # not all zeros
    assert torch.equal(y, expected) and y.unique().numel() > y.numel() / 2
    return whole


@pytest.mark.parametrize("size", [(8, 8), (12, 9), (5, 16)])
@pytest.mark.parametrize("bits", oracle.BITS)
def test_the_thin_network_bit_for_bit(bits, size, monkeypatch):
    model = oracle.thin_network(bits)
    x = torch.randn(2, 3, *size)
    whole = assert_same_network(model, x, monkeypatch)
    assert torch.equal(whole(x.contiguous(memory_format=torch.channels_last)), model(
        x.contiguous(memory_format=torch.channels_last)
    ))  # fmt: skip


NETWORKS = {
    "projections": lambda: RiR(width=(16, 32, 64), depth=(1, 1, 1), shortcut="projection"),
    "fp64": lambda: RiR(width=(16, 32, 64), depth=(1, 1, 0), dtype=torch.float64),
    "post_act": lambda: nn.Sequential(
        rir.ConvBNAct(3, 8, 3, bias=True),
        rir.RiRBlock(8, 12, stride=2, outer_shortcut="post_act", outer_streams="both", shortcut="projection"),
        rir.RiRBlock(12, 12, num_layers=1, outer_shortcut="none", branch_scale=0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    ),
    "reference norm": lambda: RiR(width=(16, 32, 64), depth=(1, 1, 0), impl="reference"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_bit_for_bit(name, monkeypatch):
    torch.manual_seed(0)
    model = oracle.train_a_little(quantize_(NETWORKS[name]()))
    x = torch.randn(2, 3, 10, 9).to(next(model.parameters()))
    assert_same_network(model, x, monkeypatch)


@pytest.mark.interpreter
def test_the_norm_by_our_kernels_bit_for_bit(device, monkeypatch):
    torch.manual_seed(0)
    model = quantize_(RiR(width=(8, 16, 16), depth=(1, 1, 0), impl="triton")).to(device)
    for m in model.modules():
        if isinstance(m, Quantizer):
            m.bound.fill_(2.0)
            m.batches.fill_(1)
    x = torch.randn(2, 3, 6, 6, device=device)
    assert_same_network(model.eval(), x, monkeypatch)


def size_of(model):
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_the_size_of_the_thin_network():
    """A weight of 4 bits has half a byte; per channel remain a scale and the four vectors of the norm."""
    model = oracle.thin_network()
    whole = integer(model)
    stem, head = 27 * 16, 64 * 10
    middle = sum(9 * (i * o + (n - 1) * o * o) for i, o, n in [(16, 16, 4), (16, 32, 6), (32, 64, 6)])
    channels = 16 * 5 + 32 * 6 + 64 * 6 + 10
    layers = 18
    assert size_of(whole) == stem + head + middle // 2 + 4 * 5 * channels + layers * (4 + 8)
    assert size_of(whole) == 145_936  # bytes: scales of activations are 4, a norm's counter of batches is 8
    assert size_of(RiR(width=(16, 32, 64))) == 1_065_712
    assert not any(t.numel() and t.is_floating_point() and t.dim() > 1 for t in whole.state_dict().values())


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = oracle.thin_network(depth=(1, 1, 1)), torch.randn(2, 3, 8, 8)
    whole = integer(model)
    safetensors.save_file(whole.state_dict(), tmp_path / "integer.safetensors")
    torch.manual_seed(5)
    other = integer(oracle.train_a_little(quantize_(RiR(width=(16, 32, 64), depth=(1, 1, 1))), steps=1))
    assert not torch.equal(other(x), whole(x))
    other.load_state_dict(safetensors.load_file(tmp_path / "integer.safetensors"))
    assert torch.equal(other(x), whole(x))
    safetensors.save_file(model.state_dict(), tmp_path / "quantized.safetensors")
    twin = quantize_(RiR(width=(16, 32, 64), depth=(1, 1, 1))).eval()
    twin.load_state_dict(safetensors.load_file(tmp_path / "quantized.safetensors"))
    assert torch.equal(integer(twin)(x), whole(x))


def test_it_is_independent_and_can_be_copied():
    model, x = oracle.thin_network(depth=(1, 1, 0)), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    whole = integer(model)
    expected = whole(x)
    assert not expected.requires_grad and not any(p.requires_grad for p in whole.parameters())
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    twin = copy.deepcopy(whole)
    assert torch.equal(twin(x), expected)
    oracle.train_a_little(model, steps=1)
    assert torch.equal(whole(x), expected) and torch.equal(twin(x), expected)


def test_nan_is_refused_where_the_quantized_network_hands_it_on():
    model, x = oracle.thin_network(depth=(1, 0, 0)), torch.randn(2, 3, 8, 8)
    x[0, 0, 0, 0] = float("nan")
    assert model(x)[0].isnan().all()
    with pytest.raises(ValueError, match="NaN"):
        integer(model)(x)
    x[0, 0, 0, 0] = float("inf")
    assert torch.equal(integer(model)(x), model(x)) and model(x).isfinite().all()


def test_images_of_another_kind_are_refused():
    whole = integer(oracle.thin_network(depth=(1, 0, 0)))
    with pytest.raises(TypeError, match="float64"):
        whole(torch.randn(2, 3, 8, 8).double())
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        whole(torch.randn(2, 4, 8, 8))


def test_training_mode_is_refused():
    model = oracle.thin_network(depth=(1, 0, 0))
    whole = integer(model)
    before = copy.deepcopy(whole.state_dict())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        whole.train()(torch.randn(2, 3, 8, 8))
    assert all(torch.equal(whole.state_dict()[key], before[key]) for key in before)
    model.stages[0][0].layers[1].train()
    with pytest.raises(RuntimeError, match=r"stages\.0\.0\.layers\.1 is in training mode"):
        integer(model)


def test_models_without_codes_are_refused():
    with pytest.raises(ValueError, match="no quantized layers"):
        integer(RiR(width=(16, 32, 64), depth=(1, 0, 0)).eval())
    quantized = oracle.thin_network(depth=(1, 0, 0))
    with pytest.raises(ValueError, match="no quantized layers"):
        integer(integer(quantized))
    with pytest.raises(RuntimeError, match="has seen 0 batches"):
        integer(quantize_(RiR(width=(16, 32, 64), depth=(1, 0, 0))).eval())
    with pytest.raises(RuntimeError, match="has seen 2 batches, and quantizes its activations after 3"):
        integer(oracle.train_a_little(quantize_(rir_and_pool(), start_step=2), steps=2))
    with pytest.raises(ValueError, match="integers need bits on both"):
        integer(oracle.train_a_little(quantize_(rir_and_pool(), first_last_bits=None), steps=1))
    quantized.head.conv.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="head has a weight or an activation bound that is not finite"):
        integer(quantized)


def rir_and_pool():
    return nn.Sequential(rir.ConvBNAct(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_sums_that_int32_cannot_hold_are_refused():
    linear = QuantizedLinear(70_000, 1, weight_bits=8, activation_bits=8)
    linear(torch.rand(1, 70_000))
    with pytest.raises(ValueError, match="may exceed int32"):
        integer(linear.eval())


def test_repr():
    whole = integer(oracle.thin_network(depth=(1, 0, 0)))
    assert isinstance(whole.stem.quantizer, IntegerQuantizer)
    assert "weight_bits=8, activation_bits=8, signed" in repr(whole.stem)
