"""The naive form: four convolutions, two norms, separate adds; from rir_kernels.reference, which the tests trust."""

import copy

from torch import nn

import rir_kernels as rir


def convert(module: nn.Module) -> nn.Module:
    """A copy of a module made of our layers, each replaced by its reference."""
    return _converted(copy.deepcopy(module))


def _converted(module):
    if isinstance(module, (rir.RiRLayer, rir.RiRBlock)):
        return module.to_reference()
    for name, child in module.named_children():
        setattr(module, name, _converted(child))
    if type(module) is rir.ConvBNAct:
        module.__class__ = rir.reference.ConvBNAct  # the same attributes under the same names
    return module
