"""The kernels of one layer as they would be launched on an H200, compiled without a GPU. For a process that launches
nothing else."""

import contextlib
import itertools
import re
import struct
from dataclasses import dataclass

import torch
from triton import knobs
from triton.runtime.driver import driver

from bench.measure.roofline import Pass, kernel_passes
from bench.simulate.disassembly import CannotModel, run_on
from bench.simulate.state import Box, Kernel
from bench.simulate.tiles import described
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton import inspect
from rir_kernels.triton.launch import batchnorm, conv, runtime, wgrad
from rir_kernels.triton.shapes import Shape
from rir_kernels.triton.tiling.conv_tiles import use_tile
from rir_kernels.triton.tiling.tile import ConvConfig

PARAMETERS = 0x210  # of the constant bank of sm_90, where the arguments begin
WINDOW = 0x198  # holds the address of the arguments: taken to be their place, so that the two are the same


@dataclass(frozen=True)
class Launch:
    """What one operation of a layer does: a kernel, and for the weight gradient sums that a second kernel adds up."""

    kernel: Kernel
    tile: str
    needs: Pass  # the arithmetic and the traffic that it cannot do without
    least_flops: float  # without those on padding
    partial_bytes: float


def launched(shape: Shape, op: str, dtype: torch.dtype, tile: ConvConfig | None = None) -> Launch:
    """The launch of one operation of a RiR layer (one of `command.OPS`); `tile` forces the convolution's.

    CannotModel where the layer launches another kernel too, and as `kernel_of`.
    """
    driver.set_active(inspect._CompileOnlyDriver("sm_90"))
    found = []
    forced = use_tile(tile) if tile else contextlib.nullcontext()
    with runtime.intercepted(lambda *args, **options: found.append((args, options))), forced:
        _run(shape, op, dtype)
    found = [launch for launch in found if launch[0][0] is not wgrad._sum_weight_grad_kernel]
    if len(found) != 1:
        names = ", ".join(args[0].__name__ for args, _ in found)
        raise CannotModel(f"one kernel was expected, and these are launched: {names}")
    (kernel, programs, *args), options = found[0]
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    passes = kernel_passes(shape, dtype.itemsize)
    needs = passes["conv_train"]
    if op == "dgsums":  # z of the layer upstream
        needs = Pass(needs.flops, needs.bytes + shape.batch * shape.size**2 * shape.c_in * dtype.itemsize)
    partial = values["partial_ptr"].numel() * 4.0 if op == "wgrad" else 0.0
    compiled = kernel.warmup(*args, grid=(1,), **options)
    return Launch(
        kernel_of(compiled, values, programs), described(options), needs, needs.flops * _inside(shape) ** 2, partial
    )


def _run(shape, op, dtype):
    """The operation, on meta tensors."""
    size = -(-shape.size // shape.stride)
    spec = ConvBNActSpec(
        stride=(shape.stride,) * 2,
        padding=(shape.kernel // 2,) * 2,
        shortcut_channels=min(shape.c_in, shape.c_out) // 2,
    )
    x, z, weight = (
        torch.empty(sizes, dtype=dtype, device="meta", memory_format=torch.channels_last)
        for sizes in (
            (shape.batch, shape.c_in, shape.size, shape.size),
            (shape.batch, shape.c_out, size, size),
            (shape.c_out, shape.c_in, shape.kernel, shape.kernel),
        )
    )
    inputs, outputs = (torch.empty(count, device="meta") for count in (shape.c_in, shape.c_out))
    layer = {"bias": None, "residuals": (), "spec": spec}
    if op == "train":
        conv.conv_train(x, weight, **layer)
    elif op == "infer":
        norm = dict.fromkeys(("mean", "var", "gamma", "beta"), outputs)
        conv.conv_infer(x, weight, **layer, **norm, save_z=False)
    elif op == "dgrad":
        conv.conv_data_grad(z, weight, shape=tuple(x.shape), spec=spec)
    elif op == "dgsums":
        upstream = batchnorm.Upstream(x, *[inputs] * 4, relu=True)
        _, sums = conv.conv_data_grad(z, weight, shape=tuple(x.shape), spec=spec, upstream=upstream)
        if sums is None:
            raise CannotModel("the data gradient of this layer computes no sums")
    else:
        wgrad.conv_weight_grad(z, x, kernel=(shape.kernel,) * 2, spec=spec)


def _inside(shape):
    """Share of a convolution's taps along one axis that read no padding."""
    taps = [
        out * shape.stride + tap - shape.kernel // 2
        for out, tap in itertools.product(range(-(-shape.size // shape.stride)), range(shape.kernel))
    ]
    return sum(0 <= at < shape.size for at in taps) / len(taps)


def kernel_of(compiled, values: dict, programs: int) -> Kernel:
    """A kernel that Triton has compiled, launched with those arguments. CannotModel for spills and clusters."""
    metadata = compiled.metadata
    if metadata.num_ctas > 1:
        raise CannotModel("clusters")
    usage = run_on(knobs.nvidia.cuobjdump.path, "-res-usage", compiled.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    if stack:
        raise CannotModel(f"{stack} bytes of stack: spills")
    words, boxes = _arguments(compiled.asm["ptx"], compiled.src.signature, values, metadata.tensordesc_meta or [])
    # sides of a CTA, and of the grid
    words |= {0x0: 32 * metadata.num_warps, 0x4: 1, 0x8: 1, 0xC: programs, 0x10: 1, 0x14: 1}
    return Kernel(
        metadata.name, compiled.asm["cubin"], programs, metadata.num_warps, registers, metadata.shared, words, boxes
    )


def _arguments(ptx, signature, values, meta) -> tuple[dict[int, int], dict[int, Box]]:
    """(words of the constant bank, box of each descriptor by its place) of a launch."""
    header = ptx[ptx.index(".entry") :]
    sizes = []  # (bytes, alignment) of each parameter
    for line in header[: header.index("\n)")].splitlines()[1:]:
        if match := re.search(r"\.param (?:\.align (\d+) )?\.[a-z]+(\d+) .*?(?:\[(\d+)\])?,?$", line):
            size = int(match[3]) if match[3] else int(match[2]) // 8
            sizes.append((size, int(match[1] or size)))
    words, boxes = {WINDOW: PARAMETERS, WINDOW + 4: 0}, {}
    left, metas, place = iter(sizes), iter(meta), PARAMETERS

    def take(value):
        nonlocal place
        size, align = next(left)
        at = -(-place // align) * align
        place = at + size
        if value is not None:
            words.update({at + 4 * word: value >> 32 * word & 0xFFFFFFFF for word in range(size // 4)})
        return at

    given = ((kind, values[name]) for name, kind in signature.items() if kind != "constexpr")
    for number, (kind, value) in enumerate(leaf for pair in given for leaf in _leaves(*pair)):
        if kind.startswith("tensordesc"):
            found = next(metas)
            boxes[take(None)] = Box(tuple(found["block_size"]), tuple(value.shape), found["elem_size"])
            for length in (*value.shape, *value.strides):
                take(length)
        elif kind.startswith("*"):
            take(0x700000000000 + (number << 32))  # anywhere
        elif kind.startswith("fp"):
            take(struct.unpack("<I", struct.pack("<f", value))[0])
        else:
            take(int(value))
    return words, boxes


def _leaves(kind, value):
    """The parameters that an argument is passed as: a tuple's parts one by one."""
    if not isinstance(kind, tuple):
        yield kind, value
        return
    for part, inner in zip(kind, value, strict=True):
        if part != "constexpr":
            yield from _leaves(part, inner)
