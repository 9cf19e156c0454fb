"""The activations that an operation can end with.

Inside the package an activation is (name, parameter), or None for the identity. Here is what each name means in
PyTorch. The kernels' formulas are in `triton/kernels/activations.py`; which of torch's modules and functions compute
the same is in `surgery/activations.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Activation = tuple[str, float | None]  # name, parameter: None if it has none


@dataclass(frozen=True)
class _Kind:
    """function: of the pre-activation u and the parameter.

    by_sign: whether the derivative depends only on the sign of u, which is y's: backward needs nothing but y then, even
    if it cannot recompute u.
    """

    function: Callable[[torch.Tensor, float | None], torch.Tensor]
    by_sign: bool = False


_KINDS = {
    "relu": _Kind(lambda u, _: F.relu(u), by_sign=True),
}
RELU: Activation = ("relu", None)


def activate(u: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    """Returns act(u), computed by torch's own function."""
    if activation is None:
        return u
    name, parameter = activation
    return _KINDS[name].function(u, parameter)


def by_sign(activation: Activation | None) -> bool:
    """Whether the sign of y determines the derivative."""
    return activation is None or _KINDS[activation[0]].by_sign


def normal_form(activation) -> Activation | None:
    """Returns the pair for what a user passes: a name, a pair or None. Raises ValueError for anything else."""
    if activation is None:
        return None
    name, parameter = activation if type(activation) is tuple and len(activation) == 2 else (activation, None)
    # no look-up in the table: an array or a list is no key, and the error should name the argument
    if not isinstance(name, str) or name not in _KINDS or parameter is not None:
        raise ValueError(f"activation must be one of {', '.join(map(repr, (*_KINDS, None)))}, got {activation!r}")
    return name, parameter
