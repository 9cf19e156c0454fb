"""The compile gate: every row of the shape table, and that the gate does notice."""

import json
import os
import re
import subprocess
import sys

import pytest

from rir_kernels.triton import inspect
from rir_kernels.triton.shapes import SHAPE_TABLE, TRANSITIONS
from rir_kernels.triton.tiling.gpus import H200

OPS = {"forward, training", "forward, no identity", "forward, inference", "data gradient", "weight gradient"}


def _without_barriers_after_waits(ptx):
    """Without those between each wait for wgmma and the next write to shared memory."""
    until_write = re.compile(r"wgmma\.wait_group.*?(?=cp\.async|st\.shared|stmatrix|\Z)", re.DOTALL)
    return until_write.sub(lambda found: re.sub(r"bar\.sync\s+0;", "", found[0]), ptx)


def _python(*arguments, **environment):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    "dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.long), pytest.param("tf32", marks=pytest.mark.long)]
)
def test_every_row_of_the_shape_table_compiles_clean_for_hopper(tmp_path, dtype):
    """No spill, no serialised wgmma, nothing between shared memory and wgmma in the main loop."""
    report, saved = tmp_path / "rows.json", tmp_path / "kernels"
    done = _python("-m", "rir_kernels.triton.inspect", "--dtype", dtype, "--json", str(report), "--save", str(saved))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads(report.read_text())["rows"]
    for shape in SHAPE_TABLE + TRANSITIONS:
        mine = [row for row in rows if row["shape"] == shape.name]
        convolutions = [row for row in mine if row["kernel"].startswith("_conv")]
        # not with rows that are not aligned, nor where 192 sums leave no registers for z
        large = (dtype == "tf32" or H200.limits.sums_beside_upstream < 192) and shape.name in ("192@16", "384@8")
        sums = {"data gradient, sums"} if shape.stride == 1 and shape.c_in > 3 and not large else set()
        assert {row["op"] for row in convolutions} == OPS | sums
        # strides of two have a data gradient of their own; a weight that cannot be read in place is packed
        kernels = {row["kernel"] for row in mine} - {"_pack_weight_kernel"}
        assert len(kernels) == (10 if shape.stride == 1 else 11)
        for row in mine:
            assert row["spills"] == 0 and not row["warnings"] and not row["faults"], row
            assert row["shared_kb"] <= 227 and 0 < row["registers"] <= 255
        for row in convolutions:
            if dtype == "tf32" and row["op"] == "weight gradient":
                continue
            assert row["products"] > 0 and row["conversions"] == 0 and row["local_loads"] == 0, row
    assert len(list(saved.glob("*.ptx"))) == len(list(saved.glob("*.ttgir"))) == len(rows)
    for ptx in [path.read_text() for path in saved.glob("*_conv_*.ptx")]:
        faulty = _without_barriers_after_waits(ptx)
        if ".reqntid 256" in ptx:
            assert inspect.unguarded_writes(faulty)
        assert not inspect.unguarded_writes(faulty.replace(".reqntid 256", ".reqntid 128"))


@pytest.mark.parametrize(
    "arch", ["sm_80", "sm_100", *(pytest.param(arch, marks=pytest.mark.long) for arch in ("sm_86", "sm_89"))]
)
def test_a_layer_compiles_clean_for_other_gpus(tmp_path, arch):
    """By what each has: descriptors or none, and its own tensor-core instruction in the main loop."""
    done = _python("-c", f"""
from rir_kernels.triton import inspect
from rir_kernels.triton.shapes import Shape
rows = inspect.inspect(Shape(64, 64, 8), "bf16", "{arch}", {str(tmp_path)!r})
products = [row.products for row in rows if row.kernel.startswith("_conv")]
print(len(products), min(products) > 0, *(fault for row in rows for fault in row.faults))
""")  # fmt: skip
    assert done.stdout.split()[1:] == ["True"], done.stdout + done.stderr
    kernels = [path.read_text() for path in tmp_path.glob("*_conv_*.ptx")]
    later = ("cp.async.bulk", "wgmma", "mbarrier", "griddepcontrol")
    if arch.startswith("sm_8"):
        assert not any(name in ptx for ptx in kernels for name in later)
        assert all("cp.async" in ptx for ptx in kernels)
    else:
        assert all("cp.async.bulk.tensor" in ptx for ptx in kernels)


def test_a_tile_too_large_for_the_registers_fails_the_gate():
    """256 channels by 128 pixels on four warps are 256 accumulators a thread: the gate must see the spill."""
    done = _python("-c", """
from rir_kernels.triton import inspect
from rir_kernels.triton.tiling import conv_tiles
from rir_kernels.triton.shapes import Shape
from rir_kernels.triton.tiling.tile import ConvConfig
with conv_tiles.use_tile(ConvConfig((2, 8, 8), 256, 64, 4, 2)):
    rows = inspect.inspect(Shape(256, 256, 8), "bf16", "sm_90")
spilled = [row for row in rows if row.kernel == "_conv_fwd_kernel"]
print(all(row.spills and not row.passed for row in spilled), len(spilled))
""")  # fmt: skip
    assert done.stdout.split() == ["True", "4"], done.stdout + done.stderr


def test_the_kinds_of_tiles_that_the_rule_may_not_choose_compile_clean():
    """Tuning may choose them: taps of padding skipped, twice 128 channels, three times 64, blocks of 2x2 pixels.

    Of the larger ones of the last kind the data gradient leaves the sums of the layer upstream alone.
    """
    done = _python("-c", """
from rir_kernels.triton import inspect
from rir_kernels.triton.tiling import conv_tiles
from rir_kernels.triton.shapes import Shape
from rir_kernels.triton.tiling.tile import ConvConfig
wide, thin = Shape(512, 512, 7), Shape(32, 32, 16)
for shape, tile in (
    (wide, ConvConfig((128, 1, 1), 128, 64, 8, 4, skips=True)),
    (wide, ConvConfig((128, 1, 1), 64, 64, 8, 4, groups=3, skips=True)),
    (wide, ConvConfig((128, 1, 1), 128, 64, 8, 4, groups=2)),
    (thin, ConvConfig((2, 16, 16), 32, 32, 4, 2, fold=True)),
    (thin, ConvConfig((2, 16, 16), 32, 32, 8, 2, fold=True)),
):
    with conv_tiles.use_tile(tile):
        rows = inspect.inspect(shape, "bf16", "sm_90")
    rows = [row for row in rows if row.kernel == "_conv_fwd_kernel"]
    print(len(rows), *(fault for row in rows for fault in row.faults))
""")  # fmt: skip
    assert done.stdout.split() == ["5", "5", "5", "4", "5"], done.stdout + done.stderr


def test_kernels_are_assembled_as_triton_does_it(tmp_path):
    """With the same ptxas and the same options: which ones that are depends on Triton's version and on the GPU."""
    done = _python("-c", """
import subprocess
import torch
from rir_kernels.triton import inspect
from rir_kernels.triton.launch import batchnorm
commands, run = [], subprocess.run
def recorded(command, **options):
    if "-v" in command:  # and not to ask for its version; the rest but for the temporary files' names
        commands.append([word for word in command if ".ptx" not in word])
    return run(command, **options)
subprocess.run = recorded
with inspect.compiling("sm_90") as compiled:
    batchnorm.bn_running(torch.empty(16, device="meta"), torch.empty(16, device="meta"), 1e-5)
registers, spills, warnings = inspect.assemble(compiled[0][-1])
triton, ours = commands
print(triton == ours and "ptxas" in ours[0], 0 < registers < 256, spills, warnings)
""", TRITON_CACHE_DIR=str(tmp_path))  # fmt: skip
    assert done.stdout == "True True 0 ()\n", done.stdout + done.stderr


FOUND = {
    "registers": 90, "spills": 0, "shared_kb": 128.0, "products": 4, "waits": True, "traps": False,
    "conversions": 0, "local_loads": 0, "unguarded": 0, "warnings": (),
}  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({"spills": 8}, "8 bytes spilled"),
        ({"shared_kb": 228.0}, "228 KB of shared memory, limit 227"),
        ({"warnings": ("C7510",)}, "C7510"),
        ({"products": 0}, "no wgmma"),
        ({"traps": True}, "traps"),
        ({"conversions": 2}, "2 conversions in the main loop"),
        ({"local_loads": 1}, "1 local_loads in the main loop"),
        ({"unguarded": 3}, "3 writes to shared memory with no barrier after the wait for wgmma"),
        ({"waits": False}, "touches memory before it waits for the launch ahead"),
    ],
)
def test_each_fault_is_named(change, words):
    assert inspect._faults(FOUND, True, inspect.ARCHS["sm_90"], True) == ()
    assert inspect._faults(FOUND | change, True, inspect.ARCHS["sm_90"], True) == (words,)


def test_kernels_that_overlap_wait_before_they_touch_memory():
    """Asked for by the environment; otherwise nothing waits, and nothing needs to."""
    program = """
from rir_kernels.triton import inspect
from rir_kernels.triton.shapes import Shape
rows = inspect.inspect(Shape(5, 16, 8), "bf16", "sm_90")
print(len({row.kernel for row in rows}), {row.waits for row in rows}, [row.faults for row in rows if row.faults])
"""
    for asked, waits in (("0", "{False}"), ("1", "{True}")):
        done = _python("-c", program, RIR_KERNELS_OVERLAP=asked)
        assert done.stdout.split() == ["11", waits, "[]"], done.stdout + done.stderr


def test_an_access_before_the_wait_is_seen():
    loads = ("ld.global.b32 %r1, [%rd1];", "@%p1 ld.volatile.b32 %r1, [%rd1];",
             "cp.async.cg.shared.global [%r1], [%rd1], 16;")  # fmt: skip
    wait = "griddepcontrol.wait;"
    elsewhere = (
        "ld.param.b64 %rd1, [p];",
        "ld.shared.b32 %r2, [%r1];",
        "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r2];",
    )
    for load in loads:
        assert inspect.waits_first("\n".join([*elsewhere, wait, load]))
        assert not inspect.waits_first("\n".join([*elsewhere, load, wait]))
        assert not inspect.waits_first("\n".join([*elsewhere, load]))


def test_main_loop_is_the_innermost_one_with_the_product():
    ttgir = """\
    %a = ttg.convert_layout %b
    scf.for %i = %c0 to %n step %c1 {
      %l = ttg.local_load %m
      %r = scf.for %j = %c0 to %k step %c1 iter_args(%acc = %zero) {
        %s = ttg.local_load %t
        %d = ttng.warp_group_dot %s, %x, %acc
        scf.yield %d
      }
    }
    %e = scf.for %j = %c0 to %k step %c1 iter_args(%acc = %zero) {
      %f = ttg.convert_layout %g
    }
"""
    loop = inspect.main_loop(ttgir)
    assert loop.count("ttg.local_load") == 1 and "convert_layout" not in loop
