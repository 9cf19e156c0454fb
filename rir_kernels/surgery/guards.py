"""May a submodule be bypassed, its forward left uncalled? Asked when fusing, and again at every call.

So every answer is cheap (the modules' own dicts are read, several times faster than nn.Module's getattr), reads no
tensor's values, and is traceable by torch.compile: a reason, or an empty string.
"""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..sync_batchnorm import SyncBatchNorm2d

_PLAIN = (torch.Tensor, nn.Parameter)
_AS_GOOD = {nn.BatchNorm2d: SyncBatchNorm2d}  # norm_state reads the group off it


def call_obstacle(*inputs) -> str:
    """Why this call must take the original forward, whatever the modules: see the reasons."""
    if _has_any_global_hook():
        return "a hook is registered for all modules"
    for x in inputs:
        if not isinstance(x, torch.Tensor) or _wraps_tensors(x):
            return f"the input is a {type(x).__name__}"
    return ""


def bypass_obstacle(module, kind: type) -> str:
    """Why `module` may not be bypassed as if it were an untouched `kind`; a SyncBatchNorm2d is a BatchNorm2d here."""
    if type(module) not in (kind, _AS_GOOD.get(kind)):
        return _not_exactly(module, kind)
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "a hook is registered on it"
    attributes = module.__dict__
    if "forward" in attributes or "_conv_forward" in attributes:
        return "its forward was replaced on the instance"
    for parameter in module._parameters.values():
        if parameter is not None and _wraps_tensors(parameter):
            return f"a parameter of it is a {type(parameter).__name__}"
    return ""


def padding_of(conv: nn.Conv2d) -> tuple[int, int] | None:
    """The zero padding in numbers; None where "same" pads one side more than the other."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding != "same":
        return pair(conv.padding)
    total = [d * (k - 1) for d, k in zip(pair(conv.dilation), conv.weight.shape[2:], strict=True)]
    return None if any(size % 2 for size in total) else (total[0] // 2, total[1] // 2)


def pair(value) -> tuple[int, int]:
    """An int or a pair, as torch's functions read it."""
    return (value, value) if isinstance(value, int) else tuple(value)


def _wraps_tensors(x) -> bool:
    # DTensor, quantized weights, nested tensors: they have laws of their own for each operation
    return type(x) not in _PLAIN and is_traceable_wrapper_subclass(x)


def _not_exactly(module, kind):
    found = type(module).__name__
    if module is None:
        return f"the {kind.__name__} is missing"
    if is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, kind):
        return f"{found} is a subclass of {kind.__name__}: only the exact class is known"
    return f"{found} is not a {kind.__name__}"
