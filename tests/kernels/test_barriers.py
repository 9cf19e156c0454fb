"""Writes to shared memory that another warp group may still read are found in PTX, on every path."""

import pytest

from rir_kernels.triton.barriers import unguarded_writes

HEAD = ".visible .entry _kernel()\n.reqntid 256\n{\n"
WAIT, BARRIER = "wgmma.wait_group.sync.aligned 1;", "bar.sync \t0;"
STORE = "st.shared.v4.b32 \t[%r1], {%r2, %r3, %r4, %r5};"


def _found(*lines):
    return unguarded_writes(HEAD + "\n".join(lines) + "\nret;\n}\n")


@pytest.mark.parametrize(
    "write",
    [
        STORE,
        "@%p1 st.shared::cta.b32 [%r1], %r2;",
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r1], {%r2, %r3, %r4, %r5};",
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;",
        "@%p1 cp.async.bulk.tensor.4d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2}], [%r3];",
        "@%p1 cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2}], [%r3];",
        "atom.shared.add.u32 %r1, [%r2], 1;",
        "@%p1 mbarrier.init.shared::cta.b64 [%r1], 1;",
    ],
)
def test_each_kind_of_write(write):
    assert _found(WAIT, write) == [write]
    assert _found(WAIT, write, BARRIER, write) == [write]
    assert _found(WAIT, BARRIER, write) == _found(write, WAIT) == []


def test_what_writes_nothing_there():
    reads = "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd1, {%r1}], [%r2];", "ld.shared.b32 %r1, [%r2];"
    other = "st.global.b32 [%rd1], %r1;", "mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], %r2;"
    assert _found(WAIT, *reads, *other, f"// {STORE}") == []


@pytest.mark.parametrize("barrier", ["barrier.sync 0;", "barrier.cta.sync.aligned 0;", "barrier.cluster.wait.aligned;"])
def test_other_barriers_of_the_whole_program(barrier):
    assert _found(WAIT, barrier, STORE) == []


@pytest.mark.parametrize(
    "barrier", ["bar.warp.sync -1;", "bar.sync 1, 128;", "bar.arrive 0, 256;", "barrier.cluster.arrive.aligned;"]
)
def test_barriers_at_which_not_all_wait(barrier):
    assert _found(WAIT, barrier, STORE) == [STORE]


def test_every_path_is_followed():
    around = [WAIT, "@%p1 bra $L__BB0_2;", BARRIER, "$L__BB0_2:", STORE]
    assert _found(*around) == [STORE]
    assert _found(WAIT, "bra.uni $L__BB0_2;", STORE, "$L__BB0_2:", BARRIER, STORE) == []
    next_turn = ["$L__BB0_1: // =>This Inner Loop Header: Depth=1", STORE, WAIT, "@%p1 bra $L__BB0_1;"]
    assert _found(*next_turn) == [STORE]
    assert _found(*next_turn[:2], WAIT, BARRIER, next_turn[-1]) == []
    assert _found(WAIT, "@%p1 ret;", STORE) == [STORE]
    assert _found(WAIT, "ret;", STORE) == []


def test_labels_that_come_again_are_of_their_own_scope():
    """Inline assembly waits for an mbarrier in a loop whose label is the same each time."""
    loop = ["{", "waitLoop:", "mbarrier.try_wait.b64 complete, [%r1], %r2;", "@!complete bra.uni waitLoop;", "}"]
    assert _found(STORE, *loop, WAIT, *loop, BARRIER, STORE) == []
    assert _found(*loop, WAIT, *loop, STORE, *loop) == [STORE]


def test_one_warp_group_needs_no_barrier():
    assert unguarded_writes(f"{HEAD}{WAIT}\n{STORE}\nret;".replace("256", "128")) == []


def test_the_number_of_threads_is_asked_for():
    with pytest.raises(ValueError, match=r"no \.reqntid and no \.maxntid"):
        unguarded_writes(f"{WAIT}\n{STORE}\nret;")
