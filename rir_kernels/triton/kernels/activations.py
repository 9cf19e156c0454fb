"""The activations and their gradients, from the pre-activation u in fp32. ACT: (name, parameter), or None for none.

The backward kernels recompute u with the very same expression from the very same z as the forward kernels.
"""

import triton
import triton.language as tl


@triton.jit
def activate(u, ACT: tl.constexpr):
    """Returns act(u)."""
    if ACT is not None:
        NAME: tl.constexpr = ACT[0]
        if NAME == "relu":
            u = _relu(u)
        else:
            tl.static_assert(False, "unknown activation")
    return u


@triton.jit
def activation_grad(dy, u, ACT: tl.constexpr):
    """Returns dy * act'(u)."""
    if ACT is not None:
        NAME: tl.constexpr = ACT[0]
        if NAME == "relu":
            dy = _relu_grad(dy, u)
        else:
            tl.static_assert(False, "unknown activation")
    return dy


@triton.jit
def _relu(u):
    # propagates NaN, as torch's relu does
    return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _relu_grad(dy, u):
    """Returns dy where not (u <= 0), else 0. At a NaN in u the gradient passes, as in torch."""
    return tl.where(u <= 0, 0.0, dy)
