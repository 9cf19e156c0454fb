"""What is counted: networks, and the forms in which one training step of theirs runs."""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

import models
import rir_kernels as rir
from bench.cases import libraries
from bench.memory.count import kept
from rir_kernels.common import versions

FORMS = {
    "eager": "eager",
    "compile": "torch.compile",
    "fused": "fused",
    "fused_recompute": "fused, recompute",
}
_IMPL = "hybrid"  # keeps what "triton" does, and has no convolution that it refuses


@dataclasses.dataclass(frozen=True)
class Network:
    title: str
    size: int  # of its square images, in pixels
    plain: Callable[[], nn.Module]  # ImportError where the library is not there
    fused: Callable[[], nn.Module]


@dataclasses.dataclass(frozen=True)
class Count:
    """Bytes kept for backward: some for each image, others however many there are (statistics, weights in bf16)."""

    per_image: int
    fixed: int

    def at(self, batch: int) -> int:
        return self.fixed + batch * self.per_image


def _torchvision(name, title, size=224):
    def plain():
        library = libraries.torchvision()
        if library is None:
            raise ImportError("torchvision does not import here")
        return getattr(library.models, name)()

    def fused():
        model = plain()
        rir.fuse_(model, impl=_IMPL)
        return model

    return Network(title, size, plain, fused)


NETWORKS = {
    "resnet18": _torchvision("resnet18", "ResNet-18"),
    "resnet50": _torchvision("resnet50", "ResNet-50"),
    "rir18_wide": Network(
        "RiR-18 wide",
        32,
        lambda: models.create("rir18_wide", layers=rir.reference),
        lambda: models.create("rir18_wide", impl=_IMPL),
    ),
    "mobilenet_v2": _torchvision("mobilenet_v2", "MobileNetV2"),
}


def absent(network: Network, form: str) -> str | None:
    """Why the form cannot be counted here, in a line; None where it can."""
    try:
        network.plain()
    except ImportError as error:
        return str(error)
    missing = versions.triton_missing() if form.startswith("fused") else ""
    return f"needs {missing}" if missing else None


def count(network: Network, form: str, batch: int) -> Count:
    """The bytes at this batch and at twice as many, as a line.

    form: a key of FORMS. torch.compile is asked at the very batch, on fake tensors; the others run two and four images.
    """
    few, many = (batch, 2 * batch) if form == "compile" else (2, 4)
    measure = _compiled if form == "compile" else _eager
    at_few, at_many = measure(network, form, few), measure(network, form, many)
    per_image, rest = divmod(at_many - at_few, many - few)
    if rest:
        raise ValueError(f"{network.title}, {form}: {at_few} bytes at {few} images and {at_many} at {many} are no line")
    return Count(per_image, at_few - few * per_image)


def _eager(network, form, batch):
    ours = form.startswith("fused")
    # the interpreter refuses bfloat16, and float16 has as many bytes
    dtype = torch.float16 if ours else torch.bfloat16
    with _kernels_for_a_cpu() if ours else contextlib.nullcontext():
        model = _in_training(network.fused() if ours else network.plain())
        images = _images(network, batch)
        within = rir.recompute if form == "fused_recompute" else contextlib.nullcontext
        return kept(lambda: _loss(model, *images, dtype, within), [*_state(model), *images])


def _compiled(network, form, batch):
    torch.compiler.reset()  # what an earlier network has left counts towards the compiler's limits
    fakes = FakeTensorMode()
    with FakeCopyMode(fakes):
        model = copy.deepcopy(_in_training(network.plain()))
    run = torch.compile(model, fullgraph=True, dynamic=False, backend=_without_code)
    with fakes:
        images = _images(network, batch)
        _loss(run, *images, torch.bfloat16)  # compiles
        return kept(lambda: _loss(run, *images, torch.bfloat16), [*_state(model), *images])


def _without_code(graph, example_inputs):
    """Inductor's decompositions, passes and partition into forward and backward; the graphs run as they are."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, example_inputs, inner_compile=lambda graph, _inputs, **_options: graph)


def _in_training(model):
    return model.train().to(memory_format=torch.channels_last)


def _state(model):
    return [*model.parameters(), *model.buffers()]


def _images(network, batch):
    x = torch.zeros(batch, 3, network.size, network.size).contiguous(memory_format=torch.channels_last)
    return x, torch.zeros(batch, dtype=torch.int64)


def _loss(run, x, labels, dtype, within=contextlib.nullcontext):
    with within():
        with torch.autocast("cpu", dtype):
            logits = run(x)
        return F.cross_entropy(logits.float(), labels)


@contextlib.contextmanager
def _kernels_for_a_cpu() -> Iterator[None]:
    """Within it our kernels accept a CPU's tensors, as under the interpreter; none of them runs here."""
    versions.triton_missing()  # imports triton, whose own functions would be the interpreter's from then on
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        yield
