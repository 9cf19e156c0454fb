"""Runs one forward and backward of a module, and collects the results."""

import copy
import dataclasses

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..common.memory_format import is_channels_last, to_format
from ..common.random_state import random_states, seed_all
from ..modules import RiRLayer
from .criterion import is_floating


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of one forward and backward: tensors by (kind, name), and how the outputs were nested."""

    tensors: dict
    structure: pytree.TreeSpec
    is_random: bool = False  # whether random numbers were drawn


def run(module: nn.Module, inputs: tuple, train: bool, *, gradients: bool = True) -> Run:
    """Calls `observe` on a copy in that mode."""
    module = copy.deepcopy(module)
    module.train(train)
    return observe(module, inputs, gradients=gradients)


def observe(module: nn.Module, inputs: tuple, *, gradients: bool = True) -> Run:
    """Runs forward and backward of the module itself, with the same seed and the same cotangent at every call.

    The parameters must have no gradients before, and have none afterwards; forward updates buffers as usual. Without
    `gradients` nothing is differentiated, and forward runs under no_grad. For a compiled module, names are those of the
    original module.
    """
    leaves = [
        x.detach().clone().requires_grad_(gradients and x.is_floating_point()) if _is_tensor(x) else x for x in inputs
    ]
    seed_all(0)
    states = random_states()
    with torch.set_grad_enabled(gradients):
        # pass clones: a leaf cannot be changed in place, as a module that starts with ReLU(inplace=True) would
        outputs = module(*[x.clone() if _is_tensor(x) else x for x in leaves])
    is_random = not all(map(torch.equal, states, random_states()))
    nested, structure = pytree.tree_flatten_with_path(outputs)
    outputs = {("output", f"output{pytree.keystr(path)}"): leaf for path, leaf in nested}
    for leaf in outputs.values():
        if not (leaf is None or isinstance(leaf, (torch.Tensor, bool, int, float, str))):
            raise TypeError(
                f"forward must return tensors, or tuples, lists and dicts of them, got a {type(leaf).__name__}: "
                "wrap the module in one that does"
            )
    tensors = {key: leaf.detach().clone() if _is_tensor(leaf) else leaf for key, leaf in outputs.items()}

    roots = [leaf for leaf in outputs.values() if _is_tensor(leaf) and leaf.requires_grad]
    if roots:
        torch.autograd.backward(roots, [cotangent(root, seed) for seed, root in enumerate(roots)])
    for i, leaf in enumerate(leaves):
        if gradients and is_floating(leaf):
            tensors["input grad", "input" if len(leaves) == 1 else f"input[{i}]"] = _gradient(leaf)
    found = _named_gradients(getattr(module, "_orig_mod", module))
    return Run(tensors | {key: t for key, t in found.items() if gradients or key[0] == "buffer"}, structure, is_random)


def cotangent(output, seed):
    """Returns odd multiples of 1/8, from -15/8 to 15/8: never zero, and the same numbers in every dtype.

    It has the output's memory format, like the gradient that a following layer returns.
    """
    generator = torch.Generator().manual_seed(seed)
    values = ((torch.randint(16, output.shape, generator=generator) - 7.5) / 4).to(output)
    is_image = output.dim() == 4 and output.layout == torch.strided
    return to_format(values, is_channels_last(output)) if is_image else values


def named(module) -> dict:
    """Returns parameters (as "param grad") and buffers by (kind, name), packed layers unpacked; consumes the module."""
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if isinstance(layer, RiRLayer):
            if not name:
                module = layer.to_reference()
                break
            module.set_submodule(name, layer.to_reference())
    named = {("param grad", name): p.detach() for name, p in module.named_parameters(remove_duplicate=False)}
    return named | {("buffer", name): b for name, b in module.named_buffers(remove_duplicate=False)}


def _named_gradients(module):
    """Returns `named` of a copy whose parameters are this module's gradients: to_reference() transforms both alike."""
    gradients = [_gradient(parameter) for parameter in module.parameters()]
    module.zero_grad(set_to_none=True)
    shadow = copy.deepcopy(module)
    for parameter, gradient in zip(shadow.parameters(), gradients, strict=True):
        parameter.data = gradient
    return named(shadow)


def _gradient(leaf):
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()


def _is_tensor(x):
    return isinstance(x, torch.Tensor)
