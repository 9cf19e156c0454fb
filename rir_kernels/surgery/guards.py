"""May a submodule be bypassed, its forward left uncalled? Asked when fusing, and again at every call.

So every answer is cheap, reads no tensor's values, and is traceable by torch.compile: a reason, or an empty string.
"""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def call_obstacle(*inputs) -> str:
    """Why this call must take the original forward, whatever the module: global hooks, or inputs with laws of their own
    (DTensor, quantized and other tensors that wrap tensors).
    """
    if _has_any_global_hook():
        return "a global module hook is registered"
    for x in inputs:
        if not isinstance(x, torch.Tensor) or is_traceable_wrapper_subclass(x):
            return f"the input is a {type(x).__name__}"
    return ""


def bypass_obstacle(module, kind: type) -> str:
    """Why `module` may not be bypassed as if it were an untouched `kind`."""
    if type(module) is not kind:
        return _not_exactly(module, kind)
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "a hook is registered on it"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return "its forward was replaced on the instance"
    for parameter in module._parameters.values():
        if parameter is not None and is_traceable_wrapper_subclass(parameter):
            return f"a parameter is a {type(parameter).__name__}"
    return ""


def conv_obstacle(conv) -> str:
    """Why `conv` may not be bypassed as a Conv2d with zero padding."""
    if reason := bypass_obstacle(conv, nn.Conv2d):
        return reason
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r} (only 'zeros' is supported)"
    if padding_of(conv) is None:
        return f"padding={conv.padding!r} with an even kernel pads one side more than the other"
    return ""


def padding_of(conv: nn.Conv2d) -> tuple[int, int] | None:
    """The zero padding in numbers; None where the two sides differ."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding != "same":
        return pair(conv.padding)
    total = [d * (k - 1) for d, k in zip(pair(conv.dilation), conv.weight.shape[2:], strict=True)]
    return None if any(size % 2 for size in total) else (total[0] // 2, total[1] // 2)


def pair(value) -> tuple[int, int]:
    """As torch's functions read an int or a pair."""
    return (value, value) if isinstance(value, int) else tuple(value)


def _not_exactly(module, kind):
    found = type(module).__name__
    if module is None:
        return f"the {kind.__name__} is missing"
    if is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, kind):
        return f"{found} is a subclass of {kind.__name__}: only the exact class is known"
    return f"{found} is not a {kind.__name__}"
