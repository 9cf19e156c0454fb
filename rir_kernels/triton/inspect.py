"""The compile gate: compiles every kernel as it would be launched, for a GPU that need not be present, and checks it.

    python -m rir_kernels.triton.inspect --arch sm_90 [--dtype bf16] [--json FILE] [--save DIR]

The launchers run on meta tensors under a driver that only compiles, so the gate checks what a GPU would get: the same
configurations and specialization, assembled as Triton does it. A row fails if its kernel spills, exceeds the shared
memory, traps or causes one of ptxas's C75xx warnings (serialised wgmma). It fails if the main loop converts a layout,
has no tensor-core instruction, or loads an operand to registers although that instruction could read it from shared
memory. It also fails if a warp group could overwrite an operand that another one still reads (`barriers`). With
RIR_KERNELS_OVERLAP=1 in the environment, kernels are compiled to overlap the previous launch, and fail if they touch
memory before they have waited for it. The exit status is 1 if any row fails.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from rir_kernels.common.activations import RELU
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.barriers import unguarded_writes
from rir_kernels.triton.shapes import SHAPE_TABLE, TRANSITIONS, Shape
from rir_kernels.triton.tiling.gpus import ARCHITECTURES
from rir_kernels.triton.tiling.tile import FIELDS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
GATED = ("bf16", "fp16", "tf32")
ARCHS = {f"sm_{arch}": architecture for arch, architecture in ARCHITECTURES.items()}
DOTS = ("tt.dot ", "warp_group_dot ", "tc_gen5_mma ")
INSTRUCTIONS = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    shape: str
    dtype: str
    op: str
    kernel: str
    config: str
    registers: int
    spills: int  # bytes, stores and loads
    shared_kb: float
    products: int  # tensor-core instructions
    waits: bool  # for the previous launch, before it touches memory
    traps: bool
    conversions: int  # layout conversions in the main loop
    local_loads: int  # shared memory to registers in the main loop
    unguarded: int  # writes to shared memory that another warp group may still read
    warnings: tuple[str, ...]  # ptxas's C75xx
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults


class _CompileOnlyDriver:
    """Has the methods of a driver that JITFunction calls when it compiles without launching."""

    def __init__(self, arch: str):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


@contextlib.contextmanager
def compiling(arch: str) -> Iterator[list]:
    """Compiles launches for that architecture instead of making them. For a process that launches nothing else.

    Yields the list of (kernel name, constants, compiled kernel) of the launches so far, all on meta tensors.
    """
    from triton.runtime.driver import driver

    from rir_kernels.triton.launch import runtime

    driver.set_active(_CompileOnlyDriver(arch))
    compiled = []

    def record(kernel, _programs, *args, **options):
        constants = {name: value for name, value in options.items() if name.isupper() or name.startswith("num_")}
        compiled.append((kernel.__name__, constants, kernel.warmup(*args, grid=(1,), **options)))

    with runtime.intercepted(record):
        yield compiled


def compile_ops(shape: Shape, dtype: torch.dtype, arch: str):
    """Returns (op, kernel name, constants, compiled kernel) of each kernel that one layer of this shape launches."""
    from rir_kernels.triton.launch import batchnorm, conv, wgrad

    spec = ConvBNActSpec(
        stride=(shape.stride,) * 2,
        padding=(shape.kernel // 2,) * 2,
        # the residual stream of a RiR layer: half of the channels
        shortcut_channels=min(shape.c_in, shape.c_out) // 2,
    )
    x = _meta((shape.batch, shape.c_in, shape.size, shape.size), dtype)
    weight = _meta((shape.c_out, shape.c_in, shape.kernel, shape.kernel), dtype)
    channels = torch.empty(shape.c_out, device="meta")
    batches = torch.empty((), dtype=torch.int64, device="meta")
    norm = {"mean": channels, "gamma": channels, "beta": channels}
    ops: list[tuple] = []
    with compiling(arch) as compiled:

        def launched(op):
            ops.extend((op, *launch) for launch in compiled[len(ops) :])

        conv.conv_train(x, weight, bias=None, residuals=(), spec=replace(spec, shortcut_channels=0))
        launched("forward, no identity")
        z, moments = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
        launched("forward, training")
        conv.conv_infer(x, weight, bias=None, residuals=(), spec=spec, var=channels, save_z=False, **norm)
        launched("forward, inference")
        conv.conv_data_grad(z, weight, shape=tuple(x.shape), spec=spec)
        launched("data gradient")
        inputs = torch.empty(shape.c_in, device="meta")
        upstream = batchnorm.Upstream(x, inputs, inputs, inputs, inputs, RELU)
        _, partial = conv.conv_data_grad(z, weight, shape=tuple(x.shape), spec=spec, upstream=upstream)
        if partial is None:  # no sums: this launched the same kernel as before
            del compiled[len(ops) :]
        else:
            batchnorm.bn_sum(partial, 1.0)
        launched("data gradient, sums")
        wgrad.conv_weight_grad(z, x, kernel=(shape.kernel,) * 2, spec=spec)
        launched("weight gradient")
        batchnorm.bn_stats(z)
        statistics = batchnorm.bn_finalize(
            moments, spec.eps, running_mean=channels, running_var=channels, batches=batches, momentum=0.1
        )
        batchnorm.bn_running(channels, channels, spec.eps)
        batchnorm.bn_apply(z, statistics, gamma=channels, beta=channels, residuals=(), spec=spec)
        launched("norm, forward")
        sums = batchnorm.bn_reduce(z, z, None, invstd=channels, spec=spec, **norm)
        batchnorm.bn_apply_grad(z, z, None, sums, count=1, invstd=channels, spec=spec, **norm)
        launched("norm, backward")
    return ops


def _meta(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def inspect(shape: Shape, dtype: str, arch: str, save: str | None = None) -> list[Row]:
    """Returns the rows of one layer, one per distinct kernel; writes .ptx and .ttgir to the folder `save`."""
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    rows: list[Row] = []
    seen = set()
    for op, kernel, constants, compiled in compile_ops(shape, DTYPES[dtype], arch):
        if (op, compiled.hash) in seen:
            continue
        seen.add((op, compiled.hash))
        ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
        if save:
            stem = re.sub(r"[^\w.-]+", "_", f"{shape.name}_{dtype}_{op}{kernel}_{len(rows)}")
            Path(save).mkdir(parents=True, exist_ok=True)
            (Path(save) / f"{stem}.ptx").write_text(ptx)
            (Path(save) / f"{stem}.ttgir").write_text(ttgir)
        registers, spills, warnings = assemble(compiled)
        loop = main_loop(ttgir)
        found = {
            "registers": registers,
            "spills": spills,
            "shared_kb": compiled.metadata.shared / 1024,
            "products": ptx.count(INSTRUCTIONS[ARCHS[arch].product]),
            "waits": waits_first(ptx),
            "traps": "trap;" in ptx,
            "conversions": loop.count("ttg.convert_layout"),
            "local_loads": loop.count("ttg.local_load"),
            "unguarded": len(unguarded_writes(ptx)),
            "warnings": warnings,
        }
        # ieee fp32 has no tensor-core product; a tf32 weight gradient would have to read transposed from shared
        # memory, which tensor cores do only for 16 bits
        exempt = dtype == "fp32" or (dtype == "tf32" and op == "weight gradient")
        multiplies = kernel.startswith("_conv") and not exempt
        faults = _faults(found, multiplies, ARCHS[arch], constants["USE_PDL"])
        rows.append(Row(shape.name, dtype, op, kernel, _describe(constants), **found, faults=faults))
    return rows


def _faults(found, multiplies, architecture, overlap):
    faults = []
    if overlap and not found["waits"]:
        faults.append("touches memory before it waits for the launch ahead")
    if found["spills"]:
        faults.append(f"{found['spills']} bytes spilled")
    if found["shared_kb"] > architecture.shared_kb:
        faults.append(f"{found['shared_kb']:.0f} KB of shared memory, limit {architecture.shared_kb}")
    if found["traps"]:
        faults.append("traps")
    if found["unguarded"]:
        faults.append(f"{found['unguarded']} writes to shared memory with no barrier after the wait for wgmma")
    if found["warnings"]:
        faults.append(" ".join(found["warnings"]))
    if multiplies:
        if not found["products"]:
            faults.append(f"no {architecture.product}")
        # mma.sync takes its operands from registers
        for name in ("conversions",) if architecture.product == "mma" else ("conversions", "local_loads"):
            if found[name]:
                faults.append(f"{found[name]} {name} in the main loop")
    return tuple(faults)


def assemble(compiled) -> tuple[int, int, tuple[str, ...]]:
    """Returns (registers per thread, bytes spilled, C75xx warnings) of a compiled kernel, from ptxas's log.

    Triton assembles the kernel again, so that its own choice of ptxas and options for this GPU applies: both differ
    between versions of Triton.
    """
    from triton import knobs
    from triton.compiler.compiler import make_backend

    target = compiled.metadata.target
    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        make_backend(target).make_cubin(compiled.asm["ptx"], {}, compiled.metadata, target.arch)
    log = log.getvalue()
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    return max(registers), sum(spills), tuple(sorted(set(re.findall(r"C75\d\d", log))))


def waits_first(ptx: str) -> bool:
    """Whether `griddepcontrol.wait` precedes the first access to global memory."""
    access = re.search(r"(?<![\w.])(cp\.|(ld|st|red|atom|multimem)\.(?!param|[\w.]*shared))", ptx)
    return "griddepcontrol.wait" in ptx[: access.start() if access else None]


def main_loop(ttgir: str) -> str:
    """Returns the text of the innermost loops that contain a matrix product."""
    lines = ttgir.splitlines()
    loops = []
    for start, line in enumerate(lines):
        if "scf.for" in line:
            indent = len(line) - len(line.lstrip())
            end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(" " * indent + "}"))
            body = "\n".join(lines[start + 1 : end])
            if "scf.for" not in body and any(dot in body for dot in DOTS):
                loops.append(body)
    return "\n".join(loops)


def _describe(constants) -> str:
    """Formats the configuration briefly: tile, warps and stages."""
    names = {"BOX": "", "PIXEL_ORDER": "", "BLOCK_M": "m ", "BLOCK_C": "c ", "BLOCK_K": "k ",
             "BLOCK_CO": "co ", "BLOCK_CI": "ci ", "BLOCK_T": "t ", "BLOCK_S": "s ", "BLOCK": ""}  # fmt: skip
    parts = [f"{label}{constants[name]}".replace(" (", "(") for name, label in names.items() if name in constants]
    for name in ("C_BLOCKS", "ROWS"):
        if constants.get(name, 1) > 1:
            parts.append(f"{FIELDS.get(name, name.lower())} {constants[name]}")
    parts += [FIELDS[name] for name in ("SKIP_PADDING", "FOLD_2X2") if constants.get(name)]
    warps = constants.get("num_warps", 4)
    stages = f"/{constants['num_stages']}" if "num_stages" in constants else ""
    return " ".join([*parts, f"w{warps}{stages}"])


def run(shapes, dtypes, arch: str, save: str | None = None, workers: int | None = None) -> list[Row]:
    """Runs `inspect` over shapes and dtypes in separate processes."""
    jobs = [(shape, dtype, arch, save) for shape in shapes for dtype in dtypes]
    workers = min(len(jobs), workers or os.cpu_count() or 1)
    # fresh processes: the parent may hold kernels decorated for the interpreter
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=compile_for_real) as pool:
        return [row for rows in pool.map(inspect, *zip(*jobs, strict=True)) for row in rows]


def compile_for_real():
    """Initializes a process that compiles kernels and runs none."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def table(rows: list[Row]) -> str:
    """Formats the rows as aligned text."""
    header = ("shape", "dtype", "op", "kernel", "config", "regs", "spill", "smem KB", "mma", "cvt", "lds", "")
    lines = [header] + [
        (
            row.shape, row.dtype, row.op, row.kernel.strip("_").removesuffix("_kernel"), row.config,
            str(row.registers), str(row.spills), f"{row.shared_kb:.0f}", str(row.products), str(row.conversions),
            str(row.local_loads), "ok" if row.passed else "FAIL " + "; ".join(row.faults),
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rir_kernels.triton.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_90", choices=ARCHS)
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be given again; by default all but fp32")
    parser.add_argument("--table-only", action="store_true", help="the eleven rows alone, no stems and transitions")
    parser.add_argument("--json", metavar="FILE", help="write the rows")
    parser.add_argument("--save", metavar="DIR", help="keep every kernel's .ptx and .ttgir")
    args = parser.parse_args(argv)
    shapes = SHAPE_TABLE if args.table_only else SHAPE_TABLE + TRANSITIONS
    rows = run(shapes, args.dtype or GATED, args.arch, args.save)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps({"arch": args.arch, "rows": [asdict(row) for row in rows]}, indent=1))
    failed = [row for row in rows if not row.passed]
    print(f"\n{len(rows)} kernels for {args.arch}, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
