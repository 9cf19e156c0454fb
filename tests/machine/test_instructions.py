"""Instructions one by one, on numbers at the edges of their types, against Python's and torch's arithmetic."""

import math

import numpy as np
import pytest
import torch

from emulator.ptx import Unsupported, parse

from .snippets import execute

I32 = np.array([
    0, 1, -1, 2, -2, 7, -7, 31, 32, 33, 100, -100, 65535, 65536, -65536, 12345, -54321, 2**30, -(2**30), 2**31 - 1,
    -(2**31), -(2**31) + 1, 3, 5, 9, 17, -17, 64, 255, 256, -255, 4096,
], dtype=np.int32)  # fmt: skip
J32 = np.roll(I32, 5)
NONZERO = np.where(J32 == 0, 11, J32)
COUNTS = np.arange(32, dtype=np.uint32) * 2  # of bits, past the register too
F32 = np.array([
    0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 3.25, -3.75, 1e-3, 1e3, 1e10, -1e10, 1e-30, 1e-40, math.inf, -math.inf,
    math.nan, 65504.0, 65520.0, 1e38, 3.4e38, 0.1, 0.2, 0.3, 1.0039062, 1.0117188, -7.0, 255.5, 2**31, -(2.0**31),
], dtype=np.float32)  # fmt: skip
G32 = np.roll(F32, 3)
HALVES = torch.from_numpy(F32).half().numpy()
BF16 = torch.from_numpy(F32).bfloat16()
CF16 = torch.from_numpy(G32).bfloat16()


def bits(tensor):
    """Of bf16, which NumPy lacks."""
    return tensor.view(torch.int16).numpy().view(np.uint16)


def wrapped(width, signed, function):
    """A function of Python's integers, in that many bits."""

    def apply(*arrays):
        kind = np.dtype(f"{'i' if signed else 'u'}{width // 8}")
        found = [function(*(int(v) for v in values)) & (1 << width) - 1 for values in zip(*arrays, strict=True)]
        return np.array(found, dtype=f"u{width // 8}").view(kind)

    return apply


def quotient(a, b):
    return math.trunc(a / b)  # exact: 32 bits fit a float of 53


def s32(function):
    return wrapped(32, True, function)


def u32(function):
    return wrapped(32, False, function)


def unsigned(array):
    return array.view(np.uint32)


def two_at_once(function):
    """Of fp32, for words of 64 bits."""
    return lambda a, b: function(a.copy().view(np.float32), b.copy().view(np.float32)).view(np.uint64)


with np.errstate(all="ignore"):
    PAIRS = np.stack([HALVES, np.roll(HALVES, 1)], 1).reshape(-1).view(np.uint32)  # of f16, the lower one first
    TWO = np.stack([np.linspace(-3, 3, 32), np.geomspace(1e-3, 1e3, 32)], 1).astype(np.float32).view(np.uint64)[:, 0]
    # instruction: what {a}, {b}, {c} are, what {d} becomes
    CASES = {
        "add.s32 {d}, {a}, {b};": ((I32, J32), s32(lambda a, b: a + b)),
        "sub.s32 {d}, {a}, {b};": ((I32, J32), s32(lambda a, b: a - b)),
        "mul.lo.s32 {d}, {a}, {b};": ((I32, J32), s32(lambda a, b: a * b)),
        "mul.hi.s32 {d}, {a}, {b};": ((I32, J32), s32(lambda a, b: a * b >> 32)),
        "mul.hi.u32 {d}, {a}, {b};": ((unsigned(I32), unsigned(J32)), u32(lambda a, b: a * b >> 32)),
        "mul.hi.u16 {d}, {a}, 21846;": ((I32.astype(np.uint16),), wrapped(16, False, lambda a: a * 21846 >> 16)),
        "mul.hi.s16 {d}, {a}, 21846;": ((I32.astype(np.int16),), wrapped(16, True, lambda a: a * 21846 >> 16)),
        "mul.wide.s32 {d}, {a}, {b};": ((I32, J32), wrapped(64, True, lambda a, b: a * b)),
        "mul.wide.u32 {d}, {a}, {b};": ((unsigned(I32), unsigned(J32)), wrapped(64, False, lambda a, b: a * b)),
        "mad.lo.s32 {d}, {a}, {b}, {a};": ((I32, J32), s32(lambda a, b: a * b + a)),
        "div.s32 {d}, {a}, {b};": ((I32, NONZERO), s32(quotient)),
        "rem.s32 {d}, {a}, {b};": ((I32, NONZERO), s32(lambda a, b: a - b * quotient(a, b))),
        "div.u32 {d}, {a}, {b};": ((unsigned(I32), unsigned(NONZERO)), u32(lambda a, b: a // b)),
        "rem.u32 {d}, {a}, 7;": ((unsigned(I32),), u32(lambda a: a % 7)),
        "min.s32 {d}, {a}, {b};": ((I32, J32), s32(min)),
        "max.u32 {d}, {a}, {b};": ((unsigned(I32), unsigned(J32)), u32(max)),
        "abs.s32 {d}, {a};": ((I32,), s32(abs)),
        "neg.s32 {d}, {a};": ((I32,), s32(lambda a: -a)),
        "and.b32 {d}, {a}, {b};": ((unsigned(I32), unsigned(J32)), u32(lambda a, b: a & b)),
        "or.b32 {d}, {a}, -16;": ((unsigned(I32),), u32(lambda a: a | -16)),
        "xor.b32 {d}, {a}, {b};": ((unsigned(I32), unsigned(J32)), u32(lambda a, b: a ^ b)),
        "not.b32 {d}, {a};": ((unsigned(I32),), u32(lambda a: ~a)),
        "shl.b32 {d}, {a}, {b};": ((unsigned(I32), COUNTS), u32(lambda a, n: a << n if n < 32 else 0)),
        "shr.u32 {d}, {a}, {b};": ((unsigned(I32), COUNTS), u32(lambda a, n: a >> n)),
        "shr.s32 {d}, {a}, {b};": ((I32, COUNTS), s32(lambda a, n: a >> n)),
        "shr.s32 {d}, {a}, 40;": ((I32,), s32(lambda a: a >> 40)),
        "shl.b32 {d}, {a}, 32;": ((unsigned(I32),), u32(lambda a: 0)),
        "bfe.u32 {d}, {a}, 5, 9;": ((unsigned(I32),), u32(lambda a: a >> 5 & 511)),
        "bfe.s32 {d}, {a}, 28, 9;": ((I32,), s32(lambda a: a >> 28)),
        "prmt.b32 {d}, {a}, {b}, 0x7632U;": ((unsigned(I32), unsigned(J32)), u32(
            lambda a, b: a >> 16 | b >> 16 << 16)),
        "prmt.b32 {d}, {a}, {b}, 0x91;": ((unsigned(I32), unsigned(J32)), u32(
            lambda a, b: (a >> 8 & 255) | 255 * (a >> 15 & 1) << 8 | (a & 255) * 0x1010000)),
        "add.s64 {d}, {a}, {b};": ((I32.astype(np.int64) << 20, J32.astype(np.int64) << 28),
                                   wrapped(64, True, lambda a, b: a + b)),
        "mul.hi.u64 {d}, {a}, {b};": ((I32.astype(np.uint64), J32.astype(np.uint64)),
                                      wrapped(64, False, lambda a, b: a * b >> 64)),
        "shr.u64 {d}, {a}, 60;": ((I32.astype(np.uint64),), wrapped(64, False, lambda a: a >> 60)),
        "cvt.s64.s32 {d}, {a};": ((I32,), lambda a: a.astype(np.int64)),
        "cvt.u64.u32 {d}, {a};": ((unsigned(I32),), lambda a: a.astype(np.uint64)),
        "cvt.u32.u64 {d}, {a};": ((I32.astype(np.uint64),), lambda a: a.astype(np.uint32)),
        "cvt.u32.u16 {d}, {a};": ((I32.astype(np.uint16),), lambda a: a.astype(np.uint32)),
        "cvt.s32.s16 {d}, {a};": ((I32.astype(np.int16),), lambda a: a.astype(np.int32)),
        "cvt.rn.f32.s32 {d}, {a};": ((I32,), lambda a: torch.from_numpy(a).float().numpy()),
        "cvt.rzi.s32.f32 {d}, {a};": ((F32,), lambda a: np.array(
            [0 if math.isnan(v) else int(max(min(v, 2**31 - 1), -(2**31))) for v in a.tolist()], dtype=np.int32)),
        "add.f32 {d}, {a}, {b};": ((F32, G32), np.add),
        "sub.rn.f32 {d}, {a}, {b};": ((F32, G32), np.subtract),
        "mul.f32 {d}, {a}, {b};": ((F32, G32), np.multiply),
        "div.rn.f32 {d}, {a}, {b};": ((F32, G32), np.divide),
        "fma.rn.f32 {d}, {a}, {b}, {c};": ((F32, G32, np.roll(F32, 7)), lambda a, b, c: torch.addcmul(
            torch.from_numpy(c).double(), torch.from_numpy(a).double(), torch.from_numpy(b).double()).float().numpy()),
        "min.f32 {d}, {a}, {b};": ((F32, G32), lambda a, b: torch.fmin(*map(torch.from_numpy, (a, b))).numpy()),
        "max.NaN.f32 {d}, {a}, {b};": ((F32, G32), lambda a, b: torch.maximum(*map(torch.from_numpy, (a, b))).numpy()),
        "neg.f32 {d}, {a};": ((F32,), np.negative),
        "abs.f32 {d}, {a};": ((F32,), np.abs),
        "sqrt.rn.f32 {d}, {a};": ((F32,), lambda a: np.sqrt(a.astype(np.float64)).astype(np.float32)),
        "selp.b32 {d}, {a}, {b}, %p1;": ((I32, J32), lambda a, b: np.where(np.arange(32) < 11, a, b)),
        "cvt.rn.bf16.f32 {d}, {a};": ((F32,), lambda a: bits(torch.from_numpy(a).bfloat16())),
        "cvt.rn.f16.f32 {d}, {a};": ((F32,), lambda a: torch.from_numpy(a).half().numpy()),
        "cvt.f32.bf16 {d}, {a};": ((bits(BF16),), lambda a: BF16.float().numpy()),
        "cvt.f32.f16 {d}, {a};": ((HALVES,), lambda a: a.astype(np.float32)),
        "cvt.rn.bf16x2.f32 {d}, {a}, {b};": ((np.nan_to_num(F32), np.nan_to_num(G32)), lambda a, b: sum(
            bits(torch.from_numpy(half).bfloat16()).astype(np.uint32) << shift for half, shift in ((a, 16), (b, 0)))),
        "add.bf16 {d}, {a}, {b};": ((bits(BF16), bits(CF16)), lambda a, b: bits(BF16 + CF16)),
        "mul.bf16 {d}, {a}, {b};": ((bits(BF16), bits(CF16)), lambda a, b: bits(BF16 * CF16)),
        "add.f16x2 {d}, {a}, {a};": ((PAIRS,), lambda a: (a.view(np.float16) * 2).view(np.uint32)),
        "add.rn.f32x2 {d}, {a}, {b};": ((TWO, TWO[::-1]), two_at_once(np.add)),
        "sub.f32x2 {d}, {a}, {b};": ((TWO, TWO[::-1]), two_at_once(np.subtract)),
        "mul.rn.f32x2 {d}, {a}, {b};": ((TWO, TWO[::-1]), two_at_once(np.multiply)),
        "fma.rn.f32x2 {d}, {a}, {b}, {a};": ((TWO, TWO[::-1]), two_at_once(
            lambda a, b: np.float32(a.astype(np.float64) * b + a))),
        # the ten bits of TF32, to nearest, ties away from zero
        "cvt.rna.tf32.f32 {d}, {a};": ((np.float32([1 + k * 2.0**-11 for k in range(32)]),), lambda a: np.float32(
            [1 + math.floor(k / 2 + 0.5) * 2.0**-10 for k in range(32)])),
        "mov.b64 {d}, {{{a}, {b}}};": ((I32, J32), wrapped(64, True, lambda a, b: b << 32 | a & 0xFFFFFFFF)),
        "mov.b32 {{%h1, %h2}}, {a};\ncvt.u32.u16 {d}, %h2;": ((unsigned(I32),), u32(lambda a: a >> 16)),
    }  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_arithmetic(text):
    arrays, function = CASES[text]
    with np.errstate(all="ignore"):
        expected = function(*arrays)
    body = "setp.lt.u32 %p1, %r60, 11;\n" + text
    found, _ = execute(body, dict(zip("abc", arrays, strict=False)), {"d": expected.dtype})
    assert_same_bits(found["d"], expected)


def assert_same_bits(found, expected):
    """NaN is any NaN; zeros have signs."""
    if expected.dtype.kind == "f":
        is_nan = np.isnan(expected)
        assert (np.isnan(found) == is_nan).all(), (found, expected)
        found, expected = found[~is_nan], expected[~is_nan]
        found, expected = (a.view(f"u{a.itemsize}") for a in (found, expected))
    elif expected.dtype == np.uint16:  # bf16
        is_nan = (expected & 0x7FFF) > 0x7F80
        assert (((found & 0x7FFF) > 0x7F80) == is_nan).all()
        found, expected = found[~is_nan], expected[~is_nan]
    np.testing.assert_array_equal(found, expected)


APPROXIMATE = {
    "ex2.approx.f32": (np.linspace(-120, 120, 32, dtype=np.float32), torch.exp2),
    "rcp.approx.ftz.f32": (np.linspace(0.1, 9, 32, dtype=np.float32), torch.reciprocal),
    "rsqrt.approx.f32": (np.linspace(0.1, 9, 32, dtype=np.float32), torch.rsqrt),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_arithmetic(name):
    """Within the two units in the last place that the manual allows a GPU."""
    x, function = APPROXIMATE[name]
    found, _ = execute(f"{name} {{d}}, {{a}};", {"a": x}, {"d": np.float32})
    np.testing.assert_allclose(found["d"], function(torch.from_numpy(x).double()).numpy(), rtol=2.0**-22)


COMPARED = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "ltu": lambda a, b: ~(a >= b), "neu": np.not_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip


@pytest.mark.parametrize("how", COMPARED)
def test_comparisons_of_numbers_that_may_be_nan(how):
    body = f"setp.{how}.f32 %p1, {{a}}, {{b}};\nselp.u32 {{d}}, 1, 0, %p1;"
    found, _ = execute(body, {"a": F32, "b": np.where(np.arange(32) % 3 == 0, F32, G32)}, {"d": np.uint32})
    np.testing.assert_array_equal(found["d"], COMPARED[how](F32, np.where(np.arange(32) % 3 == 0, F32, G32)))


def test_comparisons_of_signed_and_unsigned_differ():
    body = "setp.lt.s32 %p1, {a}, {b};\nsetp.lo.u32 %p2, {a}, {b};\nselp.u32 {d}, 1, 0, %p1;\n@%p2 add.u32 {d}, {d}, 2;"
    found, _ = execute(body, {"a": I32, "b": J32}, {"d": np.uint32})
    expected = (I32 < J32) + 2 * (I32.view(np.uint32) < J32.view(np.uint32))
    np.testing.assert_array_equal(found["d"], expected)


LANE = np.arange(32)
SHUFFLES = {
    "bfly.b32 {d}, {a}, 5, 31": LANE ^ 5,
    "down.b32 {d}, {a}, 3, 31": np.where(LANE + 3 < 32, LANE + 3, LANE),
    "up.b32 {d}, {a}, 3, 0": np.where(LANE >= 3, LANE - 3, LANE),
    "idx.b32 {d}, {a}, 9, 31": np.full(32, 9),
}


@pytest.mark.parametrize("text", SHUFFLES)
def test_shuffles(text):
    found, _ = execute(f"shfl.sync.{text}, -1;", {"a": np.tile(I32, 2)}, {"d": np.int32}, threads=64)
    np.testing.assert_array_equal(found["d"], np.tile(I32[SHUFFLES[text]], 2))


@pytest.mark.parametrize("name, function", [("add", np.add), ("min", np.minimum), ("max", np.maximum)])
def test_reductions_of_a_warp(name, function):
    a = np.concatenate([I32 >> 8, J32 >> 4])
    found, _ = execute(f"redux.sync.{name}.s32 {{d}}, {{a}}, 0xffffffff;", {"a": a}, {"d": np.int32}, threads=64)
    np.testing.assert_array_equal(found["d"], np.repeat(function.reduce(a.reshape(2, 32), 1), 32))


def test_one_lane_of_each_warp_is_elected():
    body = "elect.sync %r1|%p1, -1;\nselp.u32 {d}, 1, 0, %p1;"
    found, _ = execute(body, {"a": np.tile(I32, 2)}, {"d": np.uint32}, threads=64)
    np.testing.assert_array_equal(found["d"], np.tile(LANE == 0, 2))


def test_loops_of_as_many_rounds_as_each_thread_has():
    """Collatz: threads that leave a loop wait for the others behind it."""
    body = """mov.u32 {d}, 0;
$top: setp.eq.u32 %p1, {a}, 1;
@%p1 bra $end;
and.b32 %r1, {a}, 1;
setp.eq.u32 %p2, %r1, 0;
@%p2 bra $even;
mad.lo.s32 {a}, {a}, 3, 1;
bra.uni $next;
$even: shr.u32 {a}, {a}, 1;
$next: add.u32 {d}, {d}, 1;
bra.uni $top;
$end: add.u32 {d}, {d}, 1000;"""

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    a = np.arange(1, 129, dtype=np.uint32)
    for seed in (None, 3):
        found, _ = execute(body, {"a": a}, {"d": np.uint32}, threads=64, programs=2, seed=seed)
        np.testing.assert_array_equal(found["d"], [1000 + steps(int(n)) for n in a])


def test_a_vector_of_four_words_and_a_mask():
    body = """mul.lo.u32 %r1, %r60, 16;
cvt.u64.u32 %d15, %r1;
add.s64 %d15, %d15, {table_at};
setp.lt.u32 %p1, %r60, 5;
mov.u32 {d}, 9;
mov.u32 %r4, 9;
@%p1 ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d15];
@%p1 add.u32 {d}, %r3, %r5;"""
    table = np.arange(80, dtype=np.uint32) ** 2
    found, _ = execute(body, {"table": table[:20]}, {"d": np.uint32})
    rows = table[:20].reshape(5, 4)
    np.testing.assert_array_equal(found["d"], [*(rows[:, 1] + rows[:, 3]), *[9] * 27])


@pytest.mark.parametrize("width", [32, 64])
def test_a_parameter_that_each_thread_chooses(width):
    register, others = {32: ("%r1", "%r2"), 64: ("%d14", "%d15")}[width]
    body = f"""setp.lt.u32 %p1, %r60, 9;
mov.b{width} {register}, snippet_param_0;
mov.b{width} {others}, snippet_param_1;
selp.b{width} {register}, {register}, {others}, %p1;
ld.param.b64 %d16, [{register}];
mul.wide.u32 %d17, %r60, 4;
add.s64 %d16, %d16, %d17;
ld.global.b32 {{d}}, [%d16];"""
    found, _ = execute(body, {"a": I32, "b": J32}, {"d": np.int32})
    np.testing.assert_array_equal(found["d"], np.where(LANE < 9, I32, J32))


ROW = """mov.u32 %r1, global_smem;
and.b32 %r2, %r60, 31;
mad.lo.u32 %r3, %r2, 16, %r1;
and.b32 %r4, %r60, 992;
mad.lo.u32 %r3, %r4, 16, %r3;
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_eight_by_eight_halves(transposed):
    """Lane 4 * row + pair holds two of a row's halves, or of a column's."""
    trans = ".trans" * transposed
    values = np.arange(2 * 4 * 64, dtype=np.uint16).reshape(2, 4, 8, 8)  # [warp, matrix, row, column]
    body = f"""{ROW}mad.lo.u32 %r5, %r60, 16, %r1;
mul.lo.u32 %r6, %r60, 16;
cvt.u64.u32 %d15, %r6;
add.s64 %d15, %d15, {{table_at}};
ld.global.v4.b32 {{{{%r7, %r8, %r9, %r10}}}}, [%d15];
st.shared.v4.b32 [%r5], {{{{%r7, %r8, %r9, %r10}}}};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{{{{{d}}, {{e}}, {{f}}, {{g}}}}}}, [%r3];"""
    kinds = dict.fromkeys("defg", np.uint32)
    found, _ = execute(body, {"table": values.reshape(-1).view(np.uint32)}, kinds, threads=64, shared=1024)
    expected = values.swapaxes(2, 3) if transposed else values
    for matrix, name in enumerate("defg"):
        np.testing.assert_array_equal(found[name].view(np.uint16).reshape(2, 8, 8), expected[:, matrix])
    body = f"""{ROW}stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3], {{{{{{a}}, {{b}}, {{c}}, {{h}}}}}};
bar.sync 0;
mad.lo.u32 %r5, %r60, 16, %r1;
ld.shared.v4.b32 {{{{{{d}}, {{e}}, {{f}}, {{g}}}}}}, [%r5];"""
    lanes = dict(
        zip("abch", (np.ascontiguousarray(values[:, m]).reshape(-1).view(np.uint32) for m in range(4)), strict=True)
    )
    found, _ = execute(body, lanes, kinds, threads=64, shared=1024)
    rows = np.stack([found[name] for name in "defg"], 1).view(np.uint16)
    np.testing.assert_array_equal(rows.reshape(2, 4, 8, 8), expected)


@pytest.mark.parametrize("kind, depth", [("bf16", 16), ("f16", 16), ("tf32", 8)])
def test_products_of_one_warp(kind, depth):
    """mma.sync, from fragments laid out as the manual's figures for m16n8k16 and m16n8k8 have them."""
    generator = np.random.default_rng(0)
    a, b, c = (generator.integers(-8, 8, shape).astype(np.float32) for shape in ((16, depth), (8, depth), (16, 8)))
    group, member = LANE // 4, LANE % 4

    def registers(matrix, rows):
        """Registers of an operand [rows, depth], by (row, first column) of each lane."""
        if kind == "tf32":
            return [matrix[group + row, member + column] for column in (0, 4) for row in rows]
        narrow = torch.from_numpy(matrix).to(torch.bfloat16 if kind == "bf16" else torch.half).view(torch.int16).numpy()
        pairs = narrow.view(np.uint16).astype(np.uint32)
        return [pairs[group + row, 2 * member + column + 1] << 16 | pairs[group + row, 2 * member + column]
                for column in (0, 8) for row in rows]  # fmt: skip

    inputs = dict(zip("abce", registers(a, (0, 8)), strict=True)) | dict(zip("fg", registers(b, (0,)), strict=True))
    places = [(group, 2 * member), (group, 2 * member + 1), (group + 8, 2 * member), (group + 8, 2 * member + 1)]
    inputs |= {f"s{i}": c[place] for i, place in enumerate(places)}
    body = (f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{{{{{w}}, {{x}}, {{y}}, {{z}}}}}}, "
            "{{{a}, {b}, {c}, {e}}}, {{{f}, {g}}}, {{{s0}, {s1}, {s2}, {s3}}};")  # fmt: skip
    found, _ = execute(body, inputs, dict.fromkeys("wxyz", np.float32))
    for name, place in zip("wxyz", places, strict=True):
        np.testing.assert_array_equal(found[name], (a @ b.T + c)[place])


REFUSED = {
    "an instruction that is not known": ("popc.b32 {d}, {a};", "line 2.: popc.b32"),
    "a modifier that is not known": ("add.sat.s32 {d}, {a}, {a};", "line 2.: add.sat.s32.*: sat is not known"),
    "a rounding that is not known": ("cvt.rz.bf16.f32 %h1, {a};", "rounds to nearest alone"),
    "a shuffle within parts of a warp": ("shfl.sync.bfly.b32 {d}, {a}, 1, 15, -1;", "shfl of parts of a warp"),
    "a barrier under a predicate": (
        "setp.lt.u32 %p1, %r60, 3;\n@%p1 bar.sync 0;",
        "line 2.: @%p1 bar.sync 0: under a predicate",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_an_error_with_its_line(name):
    body, message = REFUSED[name]
    with pytest.raises(Unsupported, match=message):
        execute(body, {"a": I32}, {"d": np.uint32})


def test_a_module_without_a_kernel_is_refused():
    with pytest.raises(Unsupported, match="a module without a kernel"):
        parse(".version 8.7\n.target sm_90a\n")
