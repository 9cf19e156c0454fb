"""Joins two streams into one tensor and splits them again; adjacent streams are not copied, forward or backward.

Plain slices would give the same values. Their gradients, though, are copied one by one into contiguous tensors of
zeros, which are then added up: seven passes over an activation for two streams, and everything that follows loses the
memory format.
"""

from typing import Any

import torch
import torch.nn.functional as F

from .tracing import is_plain_eager


def join(r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """[r | t] along the channels: a view where both are adjacent slices of one buffer, else a copy.

    Each stream gets its own gradient; the buffer that they are slices of is not involved.
    """
    if r.shape[1] == 0 or t.shape[1] == 0:
        return t if r.shape[1] == 0 else r
    if torch.compiler.is_compiling() or not _adjacent(r, t):
        return torch.cat([r, t], dim=1)
    return _Join.apply(r, t)


def split(x: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (the first `channels` channels of x, the others) as views: the inverse of `join`, in backward as well.

    While autograd records, torch refuses to change them in place, as with the outputs of torch.split.
    """
    if channels == x.shape[1]:
        return x, x[:, channels:]
    if torch.is_grad_enabled() and x.requires_grad and is_plain_eager():
        return _Split.apply(x, channels)
    return x[:, :channels], x[:, channels:]


def producer(x: torch.Tensor) -> tuple[Any, bool]:
    """Returns the graph node that produced x, looking through `join` and `split`, and whether x is its whole output."""
    node: Any = x.grad_fn
    whole = True
    if isinstance(node, _Join._backward_cls):
        (of_r, r), (of_t, t) = node.next_functions  # type: ignore[attr-defined] # mypy knows no class of nodes
        if of_r is of_t and (r, t) == (0, 1):
            node = of_r
    elif isinstance(node, _Split._backward_cls):
        whole = False
    if isinstance(node, _Split._backward_cls):
        node = node.next_functions[0][0]  # type: ignore[attr-defined] # mypy knows no class of nodes
    return node, whole


def _adjacent(r, t) -> bool:
    return (
        r.device == t.device
        and r.dtype == t.dtype
        and r.shape[2:] == t.shape[2:]
        and r.shape[0] == t.shape[0]
        and r.stride() == t.stride()
        and t.storage_offset() == r.storage_offset() + r.shape[1] * r.stride(1)
        and _share_storage(r, t)
    )


def _share_storage(r, t) -> bool:
    try:
        return r.untyped_storage()._cdata == t.untyped_storage()._cdata
    except NotImplementedError:  # the wrappers of torch.func have no storage
        return False


class _Join(torch.autograd.Function):
    """A view of r's buffer that extends over t; saved like any view, so a change in place is detected."""

    generate_vmap_rule = True

    @staticmethod
    def forward(r, t):
        n, c, h, w = r.shape
        return r.as_strided((n, c + t.shape[1], h, w), r.stride())

    @staticmethod
    def setup_context(ctx, inputs, output):  # separate from forward: torch.func requires it
        ctx.channels = inputs[0].shape[1]

    @staticmethod
    def backward(ctx, grad):
        return split(grad, ctx.channels)


class _Split(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, channels):
        return x[:, :channels], x[:, channels:]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.widths = [stream.shape[1] for stream in output]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dr, dt):
        if dr is None or dt is None:
            # F.pad keeps the memory format of its input
            before, behind = (width if grad is None else 0 for width, grad in zip(ctx.widths, (dr, dt), strict=True))
            grad = dt if dr is None else dr
            return None if grad is None else F.pad(grad, (0, 0, 0, 0, before, behind)), None
        return join(dr, dt), None
