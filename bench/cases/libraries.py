"""Libraries of networks: each function returns a module, or None where it does not import."""

import functools
import importlib
from types import ModuleType

import torch


@functools.cache
def torchvision() -> ModuleType | None:
    """torchvision, whose wheels hold operators for one build of torch.

    Beside another build those do not load, and the import fails at the two whose shape functions are registered in
    Python. No network here calls them: their schemas are enough.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError:
        _declare_operators()
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        return None


@functools.cache
def timm() -> ModuleType | None:
    """timm, which imports torchvision."""
    return None if torchvision() is None else _imported("timm")


def pytorchcv(models: str) -> ModuleType | None:
    """pytorchcv.models.<models>; pytorchcv.model_provider, which has them all, needs what a CPU build lacks."""
    return _imported(f"pytorchcv.models.{models}")


def _imported(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_OPERATORS = []  # a torch.library.Library withdraws its operators when it goes


def _declare_operators():
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _OPERATORS.append(library)
