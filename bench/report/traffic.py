"""How often a layer's training step passes over memory: eager PyTorch's operators and our kernels, counted.

The unit is one activation tensor of the layer's output. An eager operator reads each input and writes each output
once; a norm reads its input twice, since the statistics come first, and in backward both of its inputs; a convolution's
two gradients are two kernels. Ours are the passes of `roofline`, as launched. Weights are left out. What a cache saves
is saved for either. Nothing runs: the operators are seen on meta tensors, so the count is the same on every machine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure.roofline import layer_passes, total
from bench.report.document import table
from bench.report.headline import replaced
from bench.report.plots import COLOURS, png, styled
from rir_kernels import reference
from rir_kernels.triton.shapes import Shape

MARKERS = "<!-- traffic:begin -->", "<!-- traffic:end -->"
README, PICTURE = Path("README.md"), Path("docs/traffic.png")
SHAPE = Shape(64, 64, 56, batch=256)
BYTES = 2  # bf16

_NORMS = "aten::native_batch_norm", "aten::native_batch_norm_backward"
_CONV_BACKWARD = "aten::convolution_backward"
_IDLE = ("aten::mul", 1), ("aten::add", 0)


class Layer(NamedTuple):
    """make: the eager module and its inputs, on meta tensors; residual: whether x joins again."""

    name: str
    make: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]
    residual: bool = False


class _Unit(nn.Module):
    """A ResNet's conv, BN, (+ x,) ReLU, as torchvision writes it."""

    def __init__(self, residual):
        super().__init__()
        self.residual, channels = residual, SHAPE.c_in
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.residual:
            y += x
        return self.relu(y)


def _image(channels):
    return torch.empty(SHAPE.batch, channels, SHAPE.size, SHAPE.size, device="meta", dtype=torch.bfloat16)


def _made(module, *channels):
    return module.to("meta", torch.bfloat16), tuple(_image(c).requires_grad_() for c in channels)


LAYERS = (
    Layer("conv, BN, ReLU", lambda: _made(_Unit(False), SHAPE.c_in)),
    Layer("conv, BN, + x, ReLU", lambda: _made(_Unit(True), SHAPE.c_in), residual=True),
    Layer("RiR, two streams", lambda: _made(reference.RiRLayer(SHAPE.c_in, SHAPE.c_out), *[SHAPE.c_in // 2] * 2)),
)


class _Traffic(TorchDispatchMode):
    """Bytes that operators move, of tensors as large as images."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.name().partition(".")[0]
        # the reference multiplies by a branch_scale of 1 and begins its sums with 0, as nobody would for speed
        is_idle = any(type(arg) in (int, float) and (name, arg) in _IDLE for arg in args)
        if not (operator.is_view or "empty" in name or name == "aten::detach" or is_idle):
            read, written = (_images(tensors) for tensors in (args, result))
            if name in _NORMS:
                read += read
            elif name == _CONV_BACKWARD:  # the gradient of x from dy, that of the weight from dy and x
                read.append(args[0])
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in read + written)
        return result


def _images(nested):
    leaves = torch.utils._pytree.tree_leaves(nested)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() == 4 and leaf.shape[2] > 3]


def eager(layer: Layer) -> tuple[float, float]:
    """(forward, backward) of a training step, in activation tensors."""
    module, inputs = layer.make()
    with _Traffic() as forward:
        outputs = module(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    with _Traffic() as backward:
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return forward.bytes / _activation(), backward.bytes / _activation()


def ours(layer: Layer) -> tuple[float, float]:
    """Likewise, of our kernels."""
    passes = layer_passes([SHAPE], BYTES, residual_bytes=_activation() if layer.residual else 0)
    weight = SHAPE.c_out * SHAPE.c_in * SHAPE.kernel**2 * BYTES
    forward, backward = (total(passes[mode]).bytes for mode in ("train_fwd", "bwd"))
    return (forward - weight) / _activation(), (backward - 2 * weight) / _activation()


def _activation():
    return SHAPE.batch * SHAPE.c_out * SHAPE.size**2 * BYTES


def block() -> str:
    """What the README has between its markers."""
    rows = []
    for layer in LAYERS:
        theirs, own = eager(layer), ours(layer)
        rows.append([layer.name, *(f"{n:g}" for n in (*theirs, sum(theirs), *own, sum(own)))])
    header = ["layer", "eager: forward", "backward", "step", "fused: forward", "backward", "step"]
    text = "Passes over an activation tensor in one training step; counted, not measured (`python -m bench traffic`):"
    return "\n\n".join([text, f"![The same as bars]({PICTURE.as_posix()})", table(header, rows)])


@styled
def bars() -> bytes:
    """A PNG: forward and backward of each layer, eager and fused."""
    figure = Figure(figsize=(9.5, 2.6), layout="constrained")
    axes = figure.subplots()
    places, labels = [], []
    for number, layer in enumerate(LAYERS):
        for offset, label, (forward, backward), colour in (
            (0.2, "eager", eager(layer), COLOURS["reference"]), (-0.2, "fused", ours(layer), COLOURS["triton"]),
        ):  # fmt: skip
            place = len(LAYERS) - number + offset
            axes.barh(place, forward, 0.36, color=colour)
            drawn = axes.barh(place, backward, 0.36, left=forward, color=colour, alpha=0.6)
            axes.bar_label(drawn, [f" {label}: {forward + backward:g}"])
        places.append(len(LAYERS) - number)
        labels.append(layer.name)
    axes.set_yticks(places, labels)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel("activation tensors read or written in a training step (dark: forward, light: backward)")
    return png(figure)


def update(root: Path) -> list[Path]:
    """Rewrites the README's block and the picture; the files that are others now."""
    readme = root / README
    text = readme.read_text(encoding="utf-8")
    new, picture, changed = replaced(text, block(), readme, MARKERS), bars(), []
    if new != text:
        readme.write_text(new, encoding="utf-8")
        changed.append(README)
    path = root / PICTURE
    if not path.exists() or path.read_bytes() != picture:
        path.write_bytes(picture)
        changed.append(PICTURE)
    return changed
