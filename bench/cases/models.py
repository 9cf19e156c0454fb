"""Whole networks: inference in the dtype's own weights, training steps under autocast with an optimizer."""

import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rir_kernels as rir
from bench import peers
from bench.cases import libraries, networks
from bench.cases.case import Case, random_input
from bench.cases.modules import Judge, inference, latest, prepared
from bench.cases.selection import Selection
from bench.measure.roofline import Pass
from bench.schema import DTYPES, IMPLS, OURS
from models import RiR
from rir_kernels.surgery.class_swap import Fused

MODES = {False: ("eval",), True: ("step", "step_recompute")}


@dataclasses.dataclass(frozen=True)
class Network:
    make: Callable[[], nn.Module]
    size: int
    batch: int
    convert: Callable  # as peers.build
    impls: tuple[str, ...]


def _rir_cifar10():
    from pytorchcv.models.rir_cifar import rir_cifar10

    return rir_cifar10()


def _torchvision(name):
    def make():
        library = libraries.torchvision()
        if library is None:
            raise ImportError("torchvision does not import here")
        return getattr(library.models, name)()

    return make


def fused_copy(impl, module, x, *, training):
    """Somebody's network as it is, compiled as it is, or after fuse_."""
    module = copy.deepcopy(module).train(training)
    if impl in OURS:
        rir.fuse_(module, impl=impl)
    return peers.compiled.convert(module, impl, training=training) if impl in peers.compiled.IMPLS else module


_FUSED_IMPLS = ("reference", *peers.compiled.IMPLS, *OURS)
OPS = {
    "rir_wide": Network(RiR, 32, 512, peers.build, IMPLS),
    "rir_cifar10": Network(_rir_cifar10, 32, 512, fused_copy, _FUSED_IMPLS),
    "resnet18": Network(networks.resnet18, 224, 256, peers.build, IMPLS),
    "resnet50": Network(networks.resnet50, 224, 256, peers.build, IMPLS),
    "torchvision_resnet18": Network(_torchvision("resnet18"), 224, 256, fused_copy, _FUSED_IMPLS),
    "torchvision_resnet50": Network(_torchvision("resnet50"), 224, 256, fused_copy, _FUSED_IMPLS),
}
# batches for a CPU
SMALL = {"rir_wide": 2, "rir_cifar10": 2} | {op: 1 for op in OPS if "resnet" in op}


class Autocast(nn.Module):
    """What training in 16 bits usually is: weights in fp32, convolutions in the dtype."""

    def __init__(self, module, dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x):
        # the cache of casts would outlive a CUDA graph's capture
        with torch.autocast(x.device.type, self.dtype, cache_enabled=False):
            return self.module(x)


def cases(selection: Selection) -> list[Case]:
    """RiR first: it is what the package is named after."""
    ops = selection.chosen_ops(OPS)
    if selection.quick and not selection.ops:
        ops = ("rir_wide",) if selection.on_cpu else ("rir_wide", "resnet50")
    return [
        _case(op, batch, dtype, selection.quick and selection.on_cpu)
        for dtype in selection.chosen_dtypes()
        for op in ops
        for batch in selection.batches or ((SMALL if selection.on_cpu else {}).get(op, OPS[op].batch),)
        if not selection.shapes or str(OPS[op].size) in selection.shapes
    ]


def _case(op, batch, dtype, no_compiling):
    network, torch_dtype = OPS[op], getattr(torch, DTYPES[dtype])
    impls = tuple(impl for impl in network.impls if not (no_compiling and impl in peers.compiled.IMPLS))
    return Case(
        suite="models", op=op, shape=str(network.size), batch=batch, dtype=dtype, modes=MODES, impls=impls,
        passes=_passes(network, batch), set_up=lambda device: _set_up(network, batch, torch_dtype, device),
    )  # fmt: skip


def _passes(network, batch):
    """The arithmetic alone: which passes a whole network cannot do without depends on who counts."""
    try:
        module = network.convert("reference", network.make(), None, training=True).to("meta")
    except ImportError:  # the library is not there: the rows will say so
        return {}
    x = torch.empty(1, 3, network.size, network.size, device="meta")
    with FlopCounterMode(display=False) as forward:
        y = module(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    eval_flops, step_flops = forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()
    return {"eval": [Pass(batch * eval_flops, 0)]} | {mode: [Pass(batch * step_flops, 0)] for mode in MODES[True]}


def _set_up(network, batch, dtype, device):
    torch.manual_seed(0)
    plain = network.make()
    trained = copy.deepcopy(plain)
    if dtype != torch.float32:
        trained = Autocast(trained, dtype)
    modules = {False: prepared(plain, dtype, device), True: prepared(trained, torch.float32, device)}
    x = random_input(batch, 3, network.size, torch.float32, device)
    inputs = {False: x.to(dtype), True: x}

    def convert(impl, training):
        return network.convert(impl, modules[training], inputs[training], training=training)

    judge = latest(lambda training: Judge(convert("reference", training), inputs[training], training))

    def build(impl, training):
        variant = convert(impl, training)
        return judge(training).variant(impl, variant, training_calls if training else inference)

    return build


def training_calls(module, x, y):
    """{mode: call} of training steps of the module on x, whose output is like y; a step returns its loss."""
    labels = torch.randint(y.shape[1], (y.shape[0],), generator=torch.Generator().manual_seed(1)).to(y.device)
    # small steps: the network is to be the same at every sample
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(module(x).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def step_recompute():
        with rir.recompute():
            return step()

    ours = any(isinstance(part, (rir.RiRLayer, rir.ConvBNAct, Fused)) for part in module.modules())
    return {"step": step} | ({"step_recompute": step_recompute} if ours else {})
