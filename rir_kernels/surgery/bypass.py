"""Guards: whether a submodule may be bypassed, its forward not called. Checked when fusing, and again at every call.

So every check is cheap (it reads the modules' dicts, several times faster than nn.Module's getattr), reads no tensor
values, and is traceable by torch.compile. It returns a reason, or an empty string.
"""

import numbers

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..common.activations import Activation
from ..sync_batchnorm import SyncBatchNorm2d
from .activations import KINDS, activation_of
from .classes import BatchNorm2d, Conv2d, Identity, know, patched
from .fallback import GLOBAL_HOOK, HOOK, PARAMETRIZED, WRAPPED
from .folded_norm import FoldedNorm
from .registry import activation_within

_PLAIN = (torch.Tensor, nn.Parameter)
# bn_state reads from these the same attributes, and the group that shares the statistics
_AS_GOOD = {BatchNorm2d: (SyncBatchNorm2d, FoldedNorm)}
for _kind in _AS_GOOD[BatchNorm2d]:
    know(_kind)


def call_obstacle(*inputs) -> str:
    """Returns why this call must run the original forward regardless of the modules, or an empty string."""
    if _has_any_global_hook():
        return GLOBAL_HOOK
    for x in inputs:
        if not isinstance(x, torch.Tensor) or _wraps_tensors(x):
            return f"the input is a {type(x).__name__}"
    return ""


def bypass_obstacle(module, kind: type) -> str:
    """Returns why `module` may not be bypassed like an untouched `kind` or an equivalent class."""
    if type(module) is not kind and type(module) not in _AS_GOOD.get(kind, ()):
        return _not_exactly(module, kind)
    return _touched(module)


def conv_obstacle(conv) -> str:
    """Returns why the convolution may not be bypassed, or cannot be fused."""
    if reason := bypass_obstacle(conv, Conv2d):
        return reason
    if conv.groups != 1:
        return "groups > 1: only ungrouped convolutions are fused"
    dilation = pair(conv.dilation)
    if dilation is None or pair(conv.stride) is None:
        return f"stride={conv.stride!r} and dilation={conv.dilation!r}: only integers are fused"
    if dilation != (1, 1):
        return f"dilation={conv.dilation}: only undilated convolutions are fused"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}: only 'zeros' is supported"
    if padding_of(conv) is None:
        if conv.padding != "same":
            return f"padding={conv.padding!r}: only integers, 'same' and 'valid' are fused"
        if pair(conv.stride) != (1, 1):
            return f"padding='same' with stride={conv.stride!r}, which torch refuses"
        return f"padding={conv.padding!r} with an even kernel pads one side more than the other"
    return ""


def norm_obstacle(norm) -> str:
    """Returns why the norm, or the activation within if its kind has one, may not be bypassed."""
    if type(norm) is BatchNorm2d or (within := activation_within(norm)) is None:
        return bypass_obstacle(norm, BatchNorm2d) or _number_obstacle(norm)
    activation, nothing = within
    if not isinstance(activation, (*KINDS, Identity)):
        return f"the activation within the norm is a {type(activation).__name__}, which is not fused"
    know(type(norm))
    return (
        _touched(norm)
        or _number_obstacle(norm)
        or (
            bypass_obstacle(activation, Identity)
            if isinstance(activation, Identity)
            else activation_obstacle(activation)
        )
        or bypass_obstacle(nothing, Identity)
    )


def _number_obstacle(norm):
    # torch also accepts tensors, and reads their values
    return "" if isinstance(norm.eps, float | int) else f"its eps is a {type(norm.eps).__name__}"


def act_of_norm(norm) -> nn.Module | Activation | None:
    """Returns the activation with which the norm's forward ends, which may have an obstacle; None without one."""
    if type(norm) is FoldedNorm:
        return norm.activation
    act, _ = (None, None) if type(norm) is BatchNorm2d else activation_within(norm) or (None, None)
    return None if isinstance(act, Identity) else act


def activation_obstacle(module) -> str:
    """Returns why the activation may not be bypassed, or cannot be fused."""
    kind = next((kind for kind in KINDS if isinstance(module, kind)), KINDS[0])
    if reason := bypass_obstacle(module, kind):
        return reason
    return "" if activation_of(module) is not None else f"{module} is not an activation that is fused"


def _touched(module) -> str:
    """Returns why a module of a known kind may still not be bypassed."""
    if reason := patched(type(module)):
        return reason
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return HOOK
    attributes = module.__dict__
    if torch.compiler.is_compiling():
        _ = module.forward, getattr(module, "_conv_forward", None)  # leaves a guard, which the next line doesn't
    if "forward" in attributes or "_conv_forward" in attributes:
        return "its forward was replaced on the instance"
    parameters = module._parameters.values()
    if "weight" in attributes or "bias" in attributes:
        parameters = (*parameters, attributes.get("weight"), attributes.get("bias"))
    for parameter in parameters:
        if parameter is not None and _wraps_tensors(parameter):
            return f"{WRAPPED} {type(parameter).__name__}"
    return ""


def tensor_of(module, name: str):
    """Returns module.name, a parameter or what replaces one."""
    parameters = module._parameters
    if name in parameters and name not in module.__dict__:
        return parameters[name]
    return getattr(module, name)


def padding_of(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Returns the zero padding as integers. None if it has other types, or if it is "same" with a stride, which torch
    rejects, or with unequal sides.
    """
    if conv.padding == "valid":
        return 0, 0
    if conv.padding != "same":
        return pair(conv.padding)
    dilation = pair(conv.dilation)
    if dilation is None or pair(conv.stride) != (1, 1):
        return None
    total = [d * (k - 1) for d, k in zip(dilation, conv.weight.shape[2:], strict=True)]
    return None if any(size % 2 for size in total) else (total[0] // 2, total[1] // 2)


def pair(value) -> tuple[int, int] | None:
    """Converts an int or a pair (possibly numpy integers) to Python ints, as torch's functions do; None for others."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    values = value if isinstance(value, tuple | list) else (value,)
    if len(values) not in (1, 2) or not all(isinstance(one, numbers.Integral) for one in values):
        return None
    return int(values[0]), int(values[-1])


def _wraps_tensors(x) -> bool:
    # DTensor, quantized weights, nested tensors: they define each operation themselves
    return type(x) not in _PLAIN and is_traceable_wrapper_subclass(x)


def _not_exactly(module, kind):
    found = type(module).__name__
    if module is None:
        return f"the {kind.__name__} is missing"
    if is_parametrized(module):
        return PARAMETRIZED
    if isinstance(module, kind):
        return f"{found} is a subclass of {kind.__name__}: only the exact class is known"
    return f"{found} is not a {kind.__name__}"
