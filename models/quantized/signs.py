"""Which convolutions read numbers that may be negative: proved from the graph of the model's forward, else assumed.

A sign is followed from call to call. Never negative are the outputs of a ReLU and of layers that end in one;
selections, means, maxima, sums and products of such numbers are not either. Everything else may be: images,
convolutions, an outer shortcut that is added after the last ReLU of a block and is a projection or carries a negative
input of the block.
"""

import dataclasses
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

import rir_kernels as rir

TYPES = (rir.RiRLayer, rir.ConvBNAct, nn.Conv2d, nn.Linear)  # exactly these
LEAVES = (rir.RiRLayer, rir.RiRBlock, rir.ConvBNAct)
RECTIFIERS = (nn.ReLU, nn.ReLU6, F.relu, torch.relu, "relu", "relu_", F.relu6, torch.sigmoid, "sigmoid")
# what makes no negative number where it is given none
KEEPING_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)  # fmt: skip
KEEPING = {
    operator.getitem, torch.cat, torch.flatten, torch.mean, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
    F.dropout, "mean", "flatten", "view", "reshape", "contiguous", "clone", "detach", "squeeze", "unsqueeze", "permute",
    "amax",
}  # fmt: skip
ARITHMETIC = {operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul, "add", "mul"}


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A module that convolves, and whether its input may be negative."""

    module: nn.Module
    signed: bool
    like: nn.Module | None = None  # of an RiRBlock's outer shortcut: the layer whose bits it shares


def convolutions(model: nn.Module) -> list[Convolution]:
    """RiRLayers, ConvBNActs, Conv2ds and Linears in the order of their first call; a shortcut's follow its layers.

    ValueError where the model's forward cannot be traced.
    """
    root = nn.Sequential(model) if isinstance(model, (*LEAVES, nn.Conv2d, nn.Linear)) else model
    try:
        graph = _Tracer().trace(root)
    except Exception as error:
        raise ValueError(
            f"the forward of {type(model).__name__} cannot be traced, and without its graph nobody knows which inputs "
            f"may be negative ({type(error).__name__}: {error}): quantize its parts one by one"
        ) from error
    found: dict[nn.Module, Convolution] = {}
    never_negative: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        inputs = [never_negative[n] for n in node.all_input_nodes]
        module = root.get_submodule(node.target) if node.op == "call_module" else None
        if module is not None:
            for conv in _of(module, signed=not never_negative[_first_input(node)]):
                if type(conv.module) not in TYPES:
                    continue
                signed = conv.signed or (conv.module in found and found[conv.module].signed)
                found[conv.module] = dataclasses.replace(conv, signed=signed)
        never_negative[node] = _is_never_negative(node, module, inputs)
        if _is_in_place(node):
            never_negative[node.args[0]] = never_negative[node]
    return list(found.values())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)


def _first_input(node):
    """The node of x: a residual is never convolved."""
    return (node.args or tuple(node.kwargs.values()))[0]


def _is_in_place(node):
    named_so = node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__")
    return named_so or node.target in (operator.iadd, operator.imul)


def _of(module, signed):
    """The convolutions of one call."""
    if isinstance(module, rir.RiRBlock):
        for index, layer in enumerate(module.layers):
            yield Convolution(layer, signed and index == 0)
        for projection in (module.projection, module.projection_t):
            if projection is not None:
                yield Convolution(projection, signed, like=module.layers[0])
    else:
        yield Convolution(module, signed)


def _is_never_negative(node, module, inputs):
    if isinstance(module, rir.RiRBlock):
        added = module.outer_shortcut == "post_act" and any(r_or_t for r_or_t, _ in module._outer_channels())
        return not added or (all(inputs) and module.projection is None and module.projection_t is None)
    if isinstance(module, rir.RiRLayer):
        return True
    if isinstance(module, rir.ConvBNAct):
        return module.activation == "relu"
    if module is not None:
        return isinstance(module, RECTIFIERS[:2]) or (isinstance(module, KEEPING_MODULES) and all(inputs))
    if node.op not in ("call_function", "call_method"):
        return node.op == "output" and all(inputs)
    if node.target in RECTIFIERS:
        return True
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float))]
    if node.target in ARITHMETIC and any(number < 0 for number in numbers):
        return False
    return node.target in KEEPING | ARITHMETIC and bool(inputs) and all(inputs)
