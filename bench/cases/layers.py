"""A RiR layer, a ResNet's basic block and a RiR block: inference, training forward, training step."""

import dataclasses

import torch

import rir_kernels as rir
from bench import peers
from bench.cases.case import Case, random_input
from bench.cases.modules import Judge, inference, latest, prepared
from bench.cases.networks import BasicBlock
from bench.cases.selection import Selection
from bench.measure.roofline import layer_passes
from bench.schema import DTYPES, IMPLS
from rir_kernels.triton.shapes import Shape

MODES = {False: ("eval",), True: ("train_fwd", "step")}

OPS = {
    "rir_layer": lambda s: rir.RiRLayer(s.c_in, s.c_out, kernel_size=s.kernel, stride=s.stride),
    "basic_block": lambda s: BasicBlock(s.c_in, s.c_out, s.stride),
    "rir_block": lambda s: rir.RiRBlock(s.c_in, s.c_out, kernel_size=s.kernel, stride=s.stride),
}


def cases(selection: Selection) -> list[Case]:
    """The most telling ones first: a run may be short of time."""
    table = selection.chosen_shapes(quick=("16@32",) if selection.on_cpu else ("96@32", "384@8", "16@32"))
    return [
        _case(op, shape, dtype)
        for dtype in selection.chosen_dtypes()
        for shapes in (table, selection.wide_shapes())
        for op in selection.chosen_ops(OPS)
        for shape in shapes
        if op != "basic_block" or (shape.c_in, shape.kernel, shape.stride) == (shape.c_out, 3, 1)
    ]


def _case(op, shape: Shape, dtype):
    torch_dtype = getattr(torch, DTYPES[dtype])
    return Case(
        suite="layers", op=op, shape=shape.name, batch=shape.batch, dtype=dtype, modes=MODES, impls=IMPLS,
        passes=_passes(op, shape, torch_dtype.itemsize), set_up=lambda device: set_up(op, shape, torch_dtype, device),
    )  # fmt: skip


def _passes(op, shape, itemsize):
    if op == "rir_layer":
        return layer_passes([shape], itemsize)
    size = -(-shape.size // shape.stride)
    second = dataclasses.replace(shape, c_in=shape.c_out, size=size, stride=1)
    activation = shape.batch * shape.c_out * size**2 * itemsize
    if op == "basic_block":
        return layer_passes([shape, second], itemsize, residual_bytes=activation)
    return layer_passes([shape, second], itemsize, residual_bytes=activation / 2, joins="conv_train")


def set_up(op: str, shape: Shape, dtype: torch.dtype, device: torch.device):
    """build(impl, training) of one op's variants."""
    torch.manual_seed(0)
    module = prepared(OPS[op](shape), dtype, device)
    x = random_input(shape.batch, shape.c_in, shape.size, dtype, device)
    judge = latest(lambda training: Judge(peers.build("reference", module, x, training=training), x, training))

    def build(impl, training):
        variant = peers.build(impl, module, x, training=training)
        return judge(training).variant(impl, variant, _training if training else inference)

    return build


def _training(module, x, y):
    x = x.detach().requires_grad_()
    parameters = list(module.parameters())
    dy = torch.randn_like(y)
    return {
        "train_fwd": lambda: module(x),
        "step": lambda: torch.autograd.grad(module(x), (x, *parameters), dy),
    }
