"""What a user could run in place of our kernels, each in its best form, and our own implementations beside them.

`build` turns a module made of our layers into an independent copy that runs on one of them.
"""

import copy
import importlib.metadata

import torch
from torch import nn

import rir_kernels as rir
from bench.peers import compiled, cudnn_graph, merged, reference, tensorrt_engine
from bench.schema import OURS


def absent(impl: str, device: torch.device) -> str | None:
    """Why it cannot be measured here, in a line; None where it can."""
    if impl in ("hybrid", "triton"):
        if device.type != "cuda":
            return "its kernels need a CUDA device (the interpreter's time would say nothing)"
        answer = rir.env_report()["impls"][impl]
        return None if answer == "yes" else answer.removeprefix("no: ")
    if impl == "cudnn":
        return cudnn_graph.absent(device)
    if impl == "tensorrt":
        return tensorrt_engine.absent(device)
    return None


def build(impl: str, module: nn.Module, x: torch.Tensor, *, training: bool) -> nn.Module:
    """A copy of `module`, in that mode, that runs on `impl`; raises what the peer itself raises where it cannot."""
    if impl in OURS:
        copied = with_impl(module, impl)
    elif impl == "reference":
        copied = reference.convert(module)
    elif impl == "cudnn":
        copied = cudnn_graph.convert(module, x, training=training)
    elif impl == "tensorrt":
        copied = tensorrt_engine.convert(module, x, training=training)
    else:
        copied = merged.convert(module)
    copied.train(training)
    return compiled.convert(copied, impl, training=training) if impl in compiled.IMPLS else copied


def versions() -> dict[str, str]:
    """Of the peers that are separate packages and installed."""
    found = {}
    for name in ("nvidia-cudnn-frontend", "tensorrt", "pytorchcv"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def with_impl(module: nn.Module, impl: str) -> nn.Module:
    """A copy whose layers of ours are told to run on `impl`."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, (rir.RiRLayer, rir.ConvBNAct)):
            layer.impl = impl
    return module
