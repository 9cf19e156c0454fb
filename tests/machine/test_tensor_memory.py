"""tcgen05 on sm_100: tensor memory, and products whose sums lie there, a few instructions at a time."""

import numpy as np
import pytest
import torch

from emulator.machine import Fault
from emulator.ptx import Unsupported

from .snippets import execute

THREAD = np.arange(128)
ALLOCATED = """setp.lt.u32 %p1, %r60, 32;
mov.u32 %r1, global_smem;
@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], {columns};
bar.sync 0;
ld.shared.b32 %r2, [global_smem];
and.b32 %r3, %r60, 96;
shl.b32 %r3, %r3, 16;
add.u32 %r4, %r2, %r3;
"""  # %r2: the address of all of it; %r4: of the warp's rows
FREED = "\nbar.sync 0;\n@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, {columns};"


def run(body, inputs, outputs, columns=32, **how):
    body = ALLOCATED.replace("{columns}", str(columns)) + body + FREED.replace("{columns}", str(columns))
    return execute(body, inputs, outputs, threads=128, shared=8192, **how)


@pytest.mark.parametrize("seed", [None, 0])
def test_rows_and_columns(seed):
    """32x32b: a row for each lane. 16x32bx2: rows 0 to 15 of the warp's, the upper half of it in other columns."""
    body = """tcgen05.st.sync.aligned.32x32b.x2.b32 [%r4 + 4], {{{a}, {b}}};
tcgen05.wait::st.sync.aligned;
bar.sync 0;
tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {{{d}}}, [%r4 + 4], 1;
tcgen05.wait::ld.sync.aligned;"""
    a, b = THREAD.astype(np.uint32) * 3, THREAD.astype(np.uint32) * 5 + 1000
    found, reports = run(body, {"a": a, "b": b}, {"d": np.uint32}, seed=seed, programs=1)
    row = THREAD // 32 * 32 + THREAD % 16
    np.testing.assert_array_equal(found["d"], np.where(THREAD % 32 < 16, a[row], b[row]))
    assert not reports


PRODUCT = """mad.lo.u32 %r5, %r60, 16, %r1;
mul.wide.u32 %d14, %r60, 16;
add.s64 %d15, %d14, {left_at};
ld.global.v4.b32 {{%r6, %r7, %r8, %r9}}, [%d15];
st.shared.v4.b32 [%r5 + 1024], {{%r6, %r7, %r8, %r9}};
add.s64 %d15, %d14, {right_at};
ld.global.v4.b32 {{%r6, %r7, %r8, %r9}}, [%d15];
st.shared.v4.b32 [%r5 + 4096], {{%r6, %r7, %r8, %r9}};
fence.proxy.async.shared::cta;
setp.eq.u32 %p2, %r60, 0;
@%p2 mbarrier.init.shared::cta.b64 [%r1 + 16], 1;
bar.sync 0;
add.u32 %r10, %r1, 1024;
shr.u32 %r10, %r10, 4;
cvt.u64.u32 %d16, %r10;
or.b64 %d16, %d16, LEFT;
add.u32 %r10, %r1, 4096;
shr.u32 %r10, %r10, 4;
cvt.u64.u32 %d17, %r10;
or.b64 %d17, %d17, RIGHT;
mov.b32 %r11, KIND;
add.u32 %r12, %r1, 16;
cvt.u64.u32 %d18, %r12;
mov.pred %p3, 0;
mov.pred %p4, -1;
@%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r2 + 0 ], %d16, %d17, %r11, %p3;
@%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r2 + 0 ], %d16, %d17, %r11, %p4;
@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%d18];
mov.b32 %r13, 0;
WAIT
tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {{{w}, {x}, {y}, {z}}}, [%r4 + 0], 4;
tcgen05.wait::ld.sync.aligned;"""
WAIT = "$again: mbarrier.try_wait.parity.shared.b64 %p5, [%r1 + 16], %r13;\n@!%p5 bra.uni $again;"


def _descriptor(leading, stride):
    return 1 << 46 | leading >> 4 << 16 | stride >> 4 << 32


def _product(wait=WAIT, seed=None, rows=64):
    """64 x 16 times 16 x 8, twice over, in bf16; without a swizzle, pieces of eight rows by 16 bytes lie one by one."""
    draw = np.random.default_rng(0)
    left, right = (draw.integers(-8, 8, shape).astype(np.float32) for shape in ((64, 16), (8, 16)))

    def pieces(matrix):  # [half of k, eight rows, row, element]
        parts = torch.from_numpy(matrix).bfloat16().view(torch.int16).numpy().reshape(-1, 8, 2, 8)
        flat = parts.transpose(2, 0, 1, 3).reshape(-1).view(np.uint32)
        return np.concatenate([flat, np.zeros(512 - len(flat), np.uint32)])

    kind = 1 << 4 | 1 << 7 | 1 << 10 | 8 // 8 << 17 | rows // 16 << 24
    body = PRODUCT.replace("LEFT", str(_descriptor(1024, 128))).replace("RIGHT", str(_descriptor(128, 128)))
    body = body.replace("KIND", str(kind)).replace("WAIT", wait)
    inputs = {"left": pieces(left), "right": pieces(right)}
    found, reports = run(body, inputs, dict.fromkeys("wxyz", np.float32), seed=seed)
    row, column = THREAD // 32 * 16 + THREAD % 16, np.where(THREAD % 32 < 16, 0, 4)
    expected = 2 * left @ right.T
    return all(np.array_equal(found[name], expected[row, column + i]) for i, name in enumerate("wxyz")), reports


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_products(seed):
    assert _product(seed=seed) == (True, [])


def test_a_product_that_is_not_waited_for_is_not_there():
    assert _product("")[0]  # in lockstep it is
    is_right, reports = _product("", seed=0)
    assert not is_right
    assert any("in flight" in report for report in reports)


def _loaded(place, after):
    """32 bits that a thread has stored and loads from `place`, one added to them where `after` says so."""
    body = f"""tcgen05.st.sync.aligned.32x32b.x1.b32 [%r4 + 0], {{{{{{a}}}}}};
tcgen05.wait::st.sync.aligned;
tcgen05.ld.sync.aligned.32x32b.x1.b32 {{{{%r20}}}}, [{place}];
{after}"""
    a = THREAD.astype(np.uint32)
    found, reports = run(body, {"a": a}, {"d": np.uint32}, seed=0, programs=1)
    return np.array_equal(found["d"], a + 1), found["d"], reports


WAITED = "tcgen05.wait::ld.sync.aligned;"


@pytest.mark.parametrize(
    "after, is_right",
    [(f"{WAITED}\nadd.u32 {{d}}, %r20, 1;", True), (f"add.u32 {{d}}, %r20, 1;\n{WAITED}", True),
     ("add.u32 {d}, %r20, 1;", False)],
    ids=["then used", "used ahead of the wait, as by LLVM", "never waited for"],
)  # fmt: skip
def test_loads_are_waited_for(after, is_right):
    found, _, reports = _loaded("%r4 + 0", after)
    assert found == is_right == (reports == [])


@pytest.mark.parametrize("place, wrong", [("%r4 + 32", "not allocated"), ("%r2 + 0", "another warp of four")])
def test_sums_that_are_not_there_are_nan_and_noted(place, wrong):
    _, found, reports = _loaded(place, f"{WAITED}\nmov.b32 {{d}}, %r20;")
    assert (found[32:] == 0xFFFFFFFF).all()
    assert reports and all(report.startswith("note: ") and wrong in report for report in reports)


def test_what_is_not_known_or_not_allowed_is_refused():
    with pytest.raises((Unsupported, Fault), match="a product of 32 rows"):
        _product(rows=32)
    with pytest.raises(Fault, match="were not allocated"):
        run("tcgen05.st.sync.aligned.32x32b.x1.b32 [%r4 + 32], {{{a}}};", {"a": THREAD}, {"d": np.uint32})
    with pytest.raises(Fault, match="another warp of four"):
        run("tcgen05.st.sync.aligned.32x32b.x1.b32 [%r2 + 0], {{{a}}};", {"a": THREAD}, {"d": np.uint32})
    with pytest.raises(Fault, match="no 512 columns"):
        run("@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 512;", {}, {"d": np.uint32})
    with pytest.raises(Unsupported, match="line"):
        run("tcgen05.ld.sync.aligned.16x64b.x1.b32 {{{d}}}, [%r4 + 0];", {}, {"d": np.uint32})
