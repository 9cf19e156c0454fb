"""The simulation against oracles that were worked out by hand, and its file against every command that reads results.

Instructions are written as nvdisasm writes them; the constants that a time is made of are stated where it is checked.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench import cli
from bench.report.check import check as check_results
from bench.report.headline import NOTHING, block
from bench.schema import ResultsError, load, load_all
from bench.simulate import check, disassembly, timing
from bench.simulate.decoded import Code
from bench.simulate.disassembly import CannotModel, Instruction, decode, disassemble
from bench.simulate.machine import BASE
from bench.simulate.multiprocessor import Run, simulate
from bench.simulate.program import Partial, Program, Warp, either
from bench.simulate.state import Box, Group, Kernel
from bench.simulate.tiles import described, tile_of
from rir_kernels.triton.tiling.tile import ConvConfig


def control(stall, sets=7, reads=7, waits=0):
    """The higher 64 bits of an instruction, of which 105 to 125 of all 128 steer its issue; other bits are noise."""
    return (stall | 1 << 4 | sets << 5 | reads << 8 | waits << 11) << 41 | 0x1_2345_6789


def instructions(text):
    """(instructions, labels): a label with a colon, or a line of "stall[, sets]; instruction"."""
    found, labels = [], {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = len(found)
        else:
            numbers, _, code = line.partition("; ")
            found.append(decode(code, control(*map(int, numbers.split(",")))))
    return found, labels


def kernel(text, constants=None, descriptors=None):
    """A CTA of one warp group."""
    made = Kernel("made_up", b"", 1, 4, 64, 0, constants or {}, descriptors or {})
    made.code = Code(*instructions(text))
    return made


# what an instruction costs that a warp meets for the first time
MACHINE = replace(BASE, fetch=0.5)


def test_an_instruction_and_its_control_bits():
    # 0x000ea80000000000 >> 41 is 0x754: stall 4, yield, scoreboard 2 with the result, none with the operands
    assert 0x000EA80000000000 >> 41 == 0x754 == 4 | 1 << 4 | 2 << 5 | 7 << 8
    assert decode("LDC R1, c[0x0][0x28]", 0x000EA80000000000) == Instruction(
        "LDC R1, c[0x0][0x28]", "LDC", "", ("R1", "c[0x0][0x28]"), stall=4, sets=2, reads=7, waits=()
    )
    found = decode("@!UP0 IADD3 R4, P1, R5.reuse, -R6, RZ", control(2, reads=3, waits=0b001001))
    assert (found.op, found.guard, found.operands) == ("IADD3", "!UP0", ("R4", "P1", "R5", "-R6", "RZ"))
    assert (found.stall, found.sets, found.reads, found.waits) == (2, 7, 3, (0, 3))
    guarded = decode("BRA P2, `(.L_x_5)", control(5))
    assert (guarded.op, guarded.guard, guarded.label) == ("BRA", "P2", ".L_x_5")


def test_a_listing(monkeypatch):
    lines = [
        '\t.section\t.text.made_up,"ax",@progbits', ".L_x_0:",
        "        /*0000*/                   NOP ;     /* 0x0000000000007918 */",
        "                                             /* 0x000fc00000000000 */",
        '\t.section\t.nv.shared.made_up,"aw",@nobits', ".L_other:",
    ]  # fmt: skip
    monkeypatch.setattr(disassembly, "run_on", lambda *_: "\n".join(lines))
    found, labels = disassemble(b"")
    # 0x000fc00000000000 >> 41 is 0x7e0: no stall, which issues as one clock
    assert [(ins.text, ins.stall, ins.sets) for ins in found] == [("NOP", 1, 7)] and labels == {".L_x_0": 0}
    monkeypatch.setattr(disassembly, "run_on", lambda *_: lines[-2])
    with pytest.raises(CannotModel, match="no instruction"):
        disassemble(b"")


MAX = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("IADD3 R0, P1, R1, R2, RZ", {"R1": MAX, "R2": 3}, {"R0": 2, "P1": 1}),
        ("IADD3 R0, P1, R1, -R2, RZ", {"R1": 3, "R2": 5}, {"R0": MAX - 1, "P1": 0}),
        ("IADD3.X R0, R1, R2, RZ, P1, !PT", {"R1": 1, "R2": 2, "P1": 1}, {"R0": 4}),
        ("UIADD3.64 UR0, UR2, UR4, URZ", {"UR2": MAX, "UR3": 1, "UR4": 1, "UR5": 0}, {"UR0": 0, "UR1": 2}),
        ("IMAD.WIDE R0, R2, R3, RZ", {"R2": MAX, "R3": 2}, {"R0": MAX - 1, "R1": MAX}),  # -1 times 2
        ("IMAD.HI.U32 R0, R2, R3, RZ", {"R2": 1 << 31, "R3": 6}, {"R0": 3}),
        ("LEA R0, R1, R2, 0x4", {"R1": 3, "R2": 7}, {"R0": 55}),
        ("LEA.HI.SX32 R0, R1, R2, 0x1e", {"R1": MAX - 7, "R2": 10}, {"R0": 8}),  # -8 >> 2
        ("LOP3.LUT R0, R1, R2, R3, 0x96, !PT", {"R1": 0b1100, "R2": 0b1010, "R3": 0b0110}, {"R0": 0}),  # exclusive or
        ("LOP3.LUT P0, RZ, R1, 0x6, RZ, 0xc0, !PT", {"R1": 4}, {"P0": 1}),
        ("SHF.R.S32.HI R0, RZ, 0x1f, R1", {"R1": 1 << 31}, {"R0": MAX}),
        ("SHF.R.U32.HI R0, RZ, 0x1f, R1", {"R1": 1 << 31}, {"R0": 1}),
        ("SHF.L.U64.HI R0, R1, 0x4, R2", {"R1": 0xF0000000, "R2": 1}, {"R0": 0x1F}),
        ("PRMT R0, R1, 0x5410, R2", {"R1": 0x11112222, "R2": 0x33334444}, {"R0": 0x44442222}),
        ("SGXT R0, R1, 0x8", {"R1": 0x80}, {"R0": MAX - 0x7F}),
        ("VIADDMNMX R0, R1, 0xffffffff, RZ, !PT", {"R1": 0}, {"R0": 0}),  # max(-1, 0)
        ("ISETP.LT.AND P0, P1, R1, 0x1, P2", {"R1": MAX, "P2": 1}, {"P0": 1, "P1": 0}),
        ("ISETP.LT.U32.AND P0, P1, R1, 0x1, P2", {"R1": MAX, "P2": 1}, {"P0": 0, "P1": 1}),
        ("PLOP3.LUT P0, PT, P1, P2, PT, 0x80, 0x8", {"P1": 1, "P2": 0}, {"P0": 0}),  # and
        ("P2R R0, PR, R1, 0x5", {"R1": 8, "P0": 1, "P2": 1}, {"R0": 13}),
        ("I2F.U32.RP R0, R1", {"R1": 16777217}, {"R0": 0x4B800001}),  # 2**24 + 1 is no float: the next one is 2 more
    ],
)  # fmt: skip
def test_what_an_instruction_computes(text, given, expected):
    files = {"R": "R", "UR": "U", "P": "P", "UP": "Q"}

    def place(token):
        letters = token.rstrip("0123456789")
        return files[letters], int(token[len(letters) :])

    program = Program([decode(text, control(1))], {place(token) for token in expected})
    warp = Warp(SimpleNamespace(index=0), 0, {})
    for token, value in given.items():
        file, index = place(token)
        warp.files[file][index] = value
    warp.run(program, 0, "")
    assert {token: warp.files[place(token)[0]][place(token)[1]] for token in expected} == expected


def test_bits_that_are_not_known_leave_the_others_known():
    # predicates are packed in R0, that of a float among them: by another one's bit the branch is still known
    found, _ = instructions("""
        1; MOV R0, 0x6
        1; FSETP.GT.AND P0, PT, R9, 1, PT
        1; @P0 LOP3.LUT R0, R0, 0x8, RZ, 0xfc, !PT
        1; LOP3.LUT P1, RZ, R0, 0x2, RZ, 0xc0, !PT
        1; LOP3.LUT P2, RZ, R0, 0x8, RZ, 0xc0, !PT
    """)
    program, warp = Program(found, {("P", 1), ("P", 2)}), Warp(SimpleNamespace(index=0), 0, {})
    for index, ins in enumerate(found):
        warp.run(program, index, ins.guard)
    assert warp.holds("P1") is True and warp.holds("!P1") is False and warp.holds("P2") is None
    both = either(0b1100, 0b1010)
    assert isinstance(both, Partial) and (both.known, both.unknown) == (0b1000, 0b0110)
    assert both & 0b1001 == 0b1000 and (both | 0b0110) == 0b1110 and either(5, 5) == 5
    for compute in (lambda: both == 8, lambda: both & 6 != 0, lambda: both + 1, lambda: both & both, lambda: both < 9):
        with pytest.raises(TypeError):
            compute()
    # predicates that two paths set differently are not known, and the same they are
    found, _ = instructions("1; @P0 ISETP.EQ.AND P1, P2, RZ, RZ, PT")
    program, warp = Program(found, {("P", 1), ("P", 2)}), Warp(SimpleNamespace(index=0), 0, {})
    warp.files["P"][1:3] = [0, 0]
    warp.run(program, 0, "P0")
    assert warp.files["P"][1:3] == [None, 0]


@pytest.mark.parametrize("set_", [True, False])
def test_predicates_packed_into_a_register_that_nothing_has_set(set_):
    found, _ = instructions(f"""
        1; ISETP.{"EQ" if set_ else "NE"}.AND P0, PT, RZ, RZ, PT
        1; LOP3.LUT R0, R0, 0xfffffffd, RZ, 0xc0, !PT
        1; @P0 LOP3.LUT R0, R0, 0x2, RZ, 0xfc, !PT
        1; LOP3.LUT P1, RZ, R0, 0x2, RZ, 0xc0, !PT
        1; LOP3.LUT P2, RZ, R0, 0x4, RZ, 0xc0, !PT
        1; SEL R1, RZ, 0x1, P2
    """)
    program, warp = Program(found, {("P", 1), ("P", 2), ("R", 1)}), Warp(SimpleNamespace(index=0), 0, {})
    for index, ins in enumerate(found):
        warp.run(program, index, ins.guard)
    assert warp.holds("P1") is set_ and warp.holds("P2") is None
    with pytest.raises(CannotModel, match="depends on what is not followed"):
        warp.read("R[1]")


LOOP = """
    5; MOV R0, RZ
.L_x_0:
    4; IADD3 R0, R0, 0x1, RZ
    6; ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT
    5; @!P0 BRA `(.L_x_0)
    5; EXIT
"""


@pytest.mark.parametrize("trips", [1, 7])
def test_a_loop_runs_as_often_as_its_argument_says(trips):
    found = simulate(kernel(LOOP, {0x210: trips}), MACHINE, [[0]])
    (group,) = found.ctas
    assert group.counts.get((2, "branch"), 0) == trips - 1  # without products all is the epilogue
    # stalls of 5 + trips * (4 + 6 + 5), and half a clock for each instruction's first time; EXIT is issued then
    assert found.clocks == 5 + 15 * trips + 0.5 * 4


def test_a_branch_on_tensors_contents_fails():
    with pytest.raises(CannotModel, match="branch at instruction 1 depends on tensors' contents"):
        simulate(kernel("2; ISETP.EQ.AND P0, PT, R9, RZ, PT\n5; @P0 BRA `(.L)\n.L:\n5; EXIT"), MACHINE, [[0]])


def test_a_scoreboard():
    found, _ = instructions("1,0; S2R R1, SR_TID.X\n1; EXIT")
    waiting = replace(found[1], waits=(0,))
    made = kernel("1; EXIT")
    made.code = Code([found[0], waiting], {})
    assert simulate(made, MACHINE, [[0]]).clocks == MACHINE.system_register == 26
    made.code = Code(found, {})
    assert simulate(made, MACHINE, [[0]]).clocks == 1.5


PIPELINE = """
    1; S2R R1, SR_TID.X
    1; ISETP.EQ.AND P0, PT, R1, RZ, PT
    1; UMOV UR4, 0x0
    1; UMOV UR5, 0x8000
    1; UMOV UR6, 0x20
    1; UMOV UR7, 0x0
    1; UMOV UR8, 0x210
    1; UMOV UR10, 0x1ffffe
    1; UMOV UR11, 0x2000
    1; @P0 SYNCS.EXCH.64 URZ, [UR5], UR10
    1; @P0 SYNCS.ARRIVE.TRANS64 RZ, [UR5], UR11
    1; @P0 UTMALDG.2D [UR4], [UR8]
    1; SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], RZ
    1; HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0
    1; WARPGROUP.DEPBAR.LE gsb0, 0x0
    1; EXIT
"""


def test_a_copy_a_wait_and_a_product():
    descriptors = {0x210: Box((64, 64), (64, 64), 2)}
    found = simulate(kernel(PIPELINE, descriptors=descriptors), replace(BASE, fetch=0), [[0]])
    # the copy is issued at 11, taken up at 20, and brings 64 rows of 32 columns: the others lie outside
    arrived = 20 + 64 * 32 * 2 / 48 + 750
    # the wait sees it after 12 clocks, the product is issued one later and begins after 8; 64 x 128 x 16 takes 64
    product = arrived + 12 + 1 + 8 + 64
    # 32 until sums can be read, 14 until the warp wakes; EXIT is one later
    assert found.clocks == pytest.approx(product + 32 + 14 + 1)
    assert found.tensor == found.loop_tensor == 64
    with pytest.raises(CannotModel, match="all warps wait for each other, the last at `SYNCS"):
        simulate(kernel(PIPELINE.replace("@P0 UTMALDG.2D [UR4], [UR8]", "NOP")), BASE, [[0]])
    with pytest.raises(CannotModel, match="a descriptor at 0x210 that is no argument"):
        simulate(kernel(PIPELINE), BASE, [[0]])


def test_waves(monkeypatch):
    queues = []

    def fake(_kernel, _machine, given):
        """500 clocks, 1,000 for each CTA of the longest place, 10 for each place; in half of them products run."""
        queues.append(given)
        clocks = 500.0 + 1000 * max(map(len, given)) + 10 * len(given)
        return Run(clocks, clocks / 2, 0.0, 0.0, [Group(None, [])])

    monkeypatch.setattr(timing, "simulate", fake)
    # of 128 threads with 168 registers an SM holds 65536 // (128 * 168) = 3
    made = replace(kernel("1; EXIT"), registers=168)
    # the busiest of 132 SMs has 9 in three full waves, the last of them further apart than there are CTAs
    nine = timing.time_of(replace(made, programs=132 * 8 + 1), BASE)
    assert (nine.residents, nine.waves, nine.clocks) == (3, 3, 3530)
    places = [min(66 + 132 * number, 132 * 8) for number in range(9)]
    assert queues == [[places[0::3], places[1::3], places[2::3]]]
    # half of the time products, so 1.9 - 0.76 * (0.5 - 0.45) GHz; a launch is 0.9 us
    assert nine.us == pytest.approx(3530 / 1.862 / 1e3 + 0.9)
    # 15 in five waves: two more than are simulated, each as long as the third
    assert timing.time_of(replace(made, programs=132 * 14 + 1), BASE).clocks == 3530 + 2 * 1000
    # 10 in four, of which the last has one CTA where others have three: 1,510 clocks instead of 1,530
    ten = timing.time_of(replace(made, programs=132 * 9 + 1), BASE)
    assert (ten.waves, ten.clocks) == (4, 3530 + 1000 - 20)
    # 4.3 MB of partial sums at 4.3 TB/s, in a launch that takes 2 us besides
    more = timing.time_of(replace(made, programs=1), BASE, partial_bytes=4.3e6)
    assert more.us == pytest.approx(1510 / 1.862 / 1e3 + 0.9 + 2.0 + 1.0)


def test_a_box_at_the_edge_moves_what_lies_inside():
    box = Box((2, 8, 16), (5, 10, 16), 2)
    assert box.bytes == 512 and box.inside([0, 0, 0]) == 512
    assert box.inside([0, -1, 4]) == 2 * 1 * 7 * 16 and box.inside([16, 0, 0]) == 0


@pytest.mark.parametrize(
    ("kind", "k", "factor", "status"),
    [("plain", 512, 1.14, 0), ("plain", 512, 1.16, 1), ("plain", 4096, 1 / 1.16, 1), ("persistent", 512, 1.5, 0)],
)
def test_the_check_fails_where_a_plain_matmul_is_off(monkeypatch, capsys, kind, k, factor, status):
    def made_up(_function, jobs, _title):
        rates = {job: check.PUBLISHED[job[0]][job[1]] * (factor if job == (kind, k) else 1.0) for job in jobs.values()}
        return {name: (rates[job],) * 3 for name, job in jobs.items()}

    monkeypatch.setattr(check, "each", made_up)
    assert cli.main(["simulate", "--check"]) == status
    printed = capsys.readouterr().out
    assert "simulated" in printed and ("more than 15% off" in printed) == bool(status)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The file of one small kernel, compiled and simulated."""
    folder = tmp_path_factory.mktemp("bench") / "simulated"
    assert cli.main(["simulate", "--shapes", "64@8", "--ops", "wgrad", "--batch", "32", "--out", str(folder)]) == 0
    return folder / "simulated.json"


def test_every_figure_is_marked(simulated):
    data = json.loads(simulated.read_text())
    assert data["kind"] == "simulated" and data["simulated"] is True and data["device"]["type"] == "simulated"
    assert len(data["sources_hash"]) == 64 and data["versions"]["triton"] and data["constants"]["base"]["sms"] == 132
    (row,) = data["rows"]
    assert (row["shape"], row["op"], row["batch"], row["simulated"]) == ("64@8", "wgrad", 32, True)
    assert row["simulated_us_optimistic"] < row["simulated_us"] < row["simulated_us_pessimistic"]
    # 2 * 32 * 64 * 64 * 9 * 64 FLOP at 790 TFLOP/s; dz and x of 32 * 64 * 64 and the weight, 2 bytes each at 4.3 TB/s
    assert row["computed_floor_us"] == round(max(150994944 / 790e6, 2 * (2 * 131072 + 36864) / 4.3e6), 2)
    known = {"simulated", "shape", "op", "batch", "dtype", "kernel", "tile", "registers", "shared_bytes", "programs",
             "ctas_per_sm", "waves", "computed_floor_us"}  # fmt: skip
    assert all(name.startswith("simulated_") for name in row.keys() - known)


def test_no_other_command_takes_it_for_a_measurement(simulated, capsys):
    (status,) = check_results(simulated.parent)
    assert status.text.startswith("simulated: current") and not status.failed
    assert block(simulated.parent.parent, simulated.parent) == NOTHING
    with pytest.raises(ResultsError, match="no results in"):
        load_all(simulated.parent)
    with pytest.raises(ResultsError, match="expected a suite's times, got results of the kind 'simulated'"):
        load(simulated)
    for command in (["compare", simulated, simulated], ["report", simulated], ["choose", simulated]):
        with pytest.raises(SystemExit):
            cli.main(list(map(str, command)))
        assert "of the kind 'simulated'" in capsys.readouterr().err


def test_a_tile_is_what_its_text_says():
    options = {"BOX": (4, 1, 32), "BLOCK_C": 128, "BLOCK_K": 32, "C_BLOCKS": 1, "ROWS": 2, "SKIP_PADDING": False}
    text = described({**options, "FOLD_2X2": (9, 3, 1), "num_warps": 8, "num_stages": 4, "KERNEL": (3, 3)})
    assert text == "box=4,1,32 block_c=128 block_k=32 num_warps=8 num_stages=4 rows=2 fold=1"
    assert tile_of(text) == ConvConfig((4, 1, 32), 128, 32, 8, 4, rows=2, fold=True)


def test_what_cannot_be_asked_for(capsys):
    for arguments, message in (
        (["--ops", "step"], "--ops: unknown 'step'; there are train, infer"),
        (["--shapes", "97@32"], "unknown shape '97@32'"),
        (["--batch", "0"], "--batch: expected numbers of images"),
        (["--tile", "box=1,8,32"], "--tile is the convolution's: name --ops without wgrad"),
        (["--ops", "train", "--tile", "box=1,8,32 c=64"], "--tile: expected 'box=4,1,32 block_c=128"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["simulate", *arguments])
        assert message in capsys.readouterr().err
