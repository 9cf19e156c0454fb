"""What layers launch, by the regular path and by replayed plans, as a driver gets it: printed as JSON.

    python tests/support/simulated/launches.py

Addresses are replaced by what lies there: an argument's name and offset, or the number of the allocation in order of
appearance. For each case: the launches of the regular path and of two replays, the second of which gets the
first one's memory; how many tensor maps that second one encoded, and how many plans were left.
"""

import contextlib
import json
import struct
import sys

import stand_in
import torch

import rir_kernels as rir
from rir_kernels.common import tracing
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.dispatch import bn_state, plan_cache


class NormAct(torch.nn.Module):
    """The norm kernels alone, with as much of a layer's interface as is used here."""

    stride = 1

    def __init__(self, channels, _, *, impl, dtype):
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(channels, dtype=dtype)
        self.impl = impl

    def forward(self, x, outer=None):
        return bn_state.norm_act(self.bn, x, spec=ConvBNActSpec(eps=self.bn.eps), impl=self.impl)


CASES = {
    "training": {},
    "training, 32 channels, stride 2": {"channels": 32, "stride": 2},
    "contiguous weight": {"weight_format": torch.contiguous_format},
    "outer residual": {"outer": 8},
    "projection": {"shortcut": "projection", "stride": 2, "residual_fraction": 0.25},
    "fp32": {"dtype": torch.float32},
    "fp16": {"dtype": torch.float16},
    "evaluation": {"training": False},
    "frozen norm": {"training": False, "grad": True},
    "contiguous image": {"image_format": torch.contiguous_format},
    "norm alone": {"layer_type": NormAct},
}


@contextlib.contextmanager
def allocating(wrap):
    """Within it torch's allocations are wrap(function) of what they were."""
    functions = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    for name, function in functions.items():
        setattr(torch, name, wrap(function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(torch, name, function)


class Memory:
    """Allocations that are kept, so that no address comes twice; or given out again, in their order."""

    def __init__(self):
        self.kept = []

    def keeping(self, function):
        return lambda *args, **options: self.kept.append(function(*args, **options)) or self.kept[-1]

    def again(self, _function):
        return lambda *_args, **_options: self.kept.pop(0).detach()  # without what was written to it in the step before


class Recorder:
    """What the driver gets of each launch."""

    def __init__(self, driver):
        self._driver = driver
        driver.on_launch = self._note
        self.launches = []

    @property
    def maps(self):
        """Tensor maps that were encoded."""
        return self._driver.maps

    def _note(self, request):
        kinds = list(_kinds(request.compiled.src.signature.values()))
        sizes = [struct.calcsize(kind.replace("P", "Q").replace("T", "128s")) for kind in kinds]
        params = [(kind, request.parameter(i, size)) for i, (kind, size) in enumerate(zip(kinds, sizes, strict=True))]
        head = request.compiled.metadata.name, request.compiled.hash, request.grid[0], request.block, request.shared
        self.launches.append((*head, int(request.programmatic), params))

    def take(self, arguments):
        """The launches since the last time, with addresses named."""
        launches, self.launches = self.launches, []
        names = {}

        def name(address):
            for argument, tensor in arguments.items():
                offset = address - tensor.data_ptr()
                if 0 <= offset < tensor.untyped_storage().nbytes():
                    return f"{argument}+{offset}"
            return names.setdefault(address, f"new {len(names)}") if address else "none"

        def value(kind, param):
            if kind == "P":
                return name(*struct.unpack_from("Q", param))
            if kind == "T":
                address, *rest = struct.unpack_from("16Q", param)
                return [name(address), *rest]
            return struct.unpack_from(kind, param)[0]

        return [[*head, [value(*param) for param in params]] for *head, params in launches]


def _kinds(signature):
    """P a pointer, T a tensor map, else as `struct` has it."""
    for kind in signature:
        if isinstance(kind, tuple):
            yield from _kinds(kind)
        elif kind.startswith("tensordesc"):
            rank = kind.count(",") + 1
            yield from ["T", *"i" * rank, *"q" * rank]
        elif kind != "constexpr":
            yield "P" if kind.startswith("*") else {"i32": "i", "i64": "q", "fp32": "f"}[kind]


def run(recorder, *, channels=16, dtype=torch.bfloat16, training=True, grad=None, outer=0,
        weight_format=torch.channels_last, image_format=torch.channels_last, layer_type=rir.RiRLayer,
        **options):  # fmt: skip
    torch.backends.cudnn.allow_tf32 = True
    layer = layer_type(channels, channels, impl="triton", dtype=dtype, **options).train(training)
    layer.bn.float()
    layer.to(memory_format=weight_format)
    x = torch.zeros(2, channels, 8, 8, dtype=dtype).to(memory_format=image_format)
    residual = torch.zeros(2, outer, 8, 8, dtype=dtype).to(memory_format=torch.channels_last) if outer else None
    differentiated = [x.requires_grad_(), *layer.parameters()]
    dy = torch.zeros(2, channels, 8 // layer.stride, 8 // layer.stride, dtype=dtype).to(memory_format=image_format)

    arguments = {
        "x": x,
        "residual": residual,
        "dy": dy,
        **dict(layer.named_parameters()),
        **dict(layer.named_buffers()),
    }
    arguments = {name: tensor for name, tensor in arguments.items() if tensor is not None}

    def step():
        y = layer(x, outer=residual)
        if y.requires_grad:
            torch.autograd.grad(y, differentiated, dy)

    plan_cache._planned.clear()
    with torch.set_grad_enabled(training if grad is None else grad):
        with allocating(Memory().keeping), tracing.no_replay():
            step()
        found = {"long": recorder.take(arguments)}
        step()  # leaves plans, which allocate nothing but on "meta"
        recorder.take(arguments)
        memory = Memory()
        for call, wrap in (("first", memory.keeping), ("second", memory.again)):
            encoded = recorder.maps
            with allocating(wrap):
                step()
            found[call] = recorder.take(arguments)
    planned = sum(plan is not None for plan in plan_cache._planned.values())
    return found | {"encoded": recorder.maps - encoded, "planned": planned}


def main():
    recorder = Recorder(stand_in.activate())
    json.dump({name: run(recorder, **case) for name, case in CASES.items()}, sys.stdout)


if __name__ == "__main__":
    main()
