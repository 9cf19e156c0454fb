"""Looks up a module's original class, which `surgery` swaps; every part of the package may use it."""

from torch import nn


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class; the original class if it is fused."""
    fusion = getattr(type(module), "_rir_fusion", None)
    return type(module) if fusion is None else fusion.original
