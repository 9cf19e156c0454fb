"""Stores one activation per layer instead of two: backward recomputes a layer's output from what that layer saved.

A layer saves z, from which its own gradients are computed; the next layer saves y = act(norm(z)), its input. Within
`recompute` that y is not stored: backward recomputes it in one pass over z, with the same kernel (bit-identical).
"""

import contextlib
import importlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_current: ContextVar["_Outputs | None"] = ContextVar("recompute", default=None)


@contextlib.contextmanager
def recompute() -> Iterator[None]:
    """Stores one activation per layer instead of two and recomputes the other in backward (bit-identical).

        with rir.recompute():
            loss = criterion(model(images), labels)
        loss.backward()

    Outputs of fused layers that an operation saves for backward are recomputed when backward runs, at the cost of one
    pass over memory per layer. This applies to eager calls of our kernels (impl "triton" and "hybrid") in this thread,
    whichever operation consumes their outputs. The output of a layer with a residual after its norm is stored as usual:
    z alone does not determine it.

    Raises RuntimeError in backward if a tensor that it needs was changed in place, as autograd does.
    """
    token = _current.set(_Outputs())
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _current.reset(token)


def remember(y, z, mean, invstd, bn_weight, bn_bias, spec) -> None:
    """Registers an output y = act(norm(z)) with everything it is computed from; does nothing outside `recompute`."""
    outputs = None if torch.compiler.is_compiling() else _current.get()
    if outputs is not None:
        outputs.add(y, _Recipe(outputs.kept(z), mean, invstd, bn_weight, bn_bias, spec, y))


def saves_in_place(z) -> bool:
    """Whether z, saved for backward, stays in place: it may be recomputed, or moved by other hooks, e.g. to the CPU."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is None or (hooks == (_pack, _unpack) and type(_pack(z)) is _Kept)


class _Outputs:
    """The recipes of the outputs that are still alive, keyed by storage: autograd may save an alias of them."""

    def __init__(self):
        self._recipes = {}

    def add(self, y, recipe):
        address = y.untyped_storage()._cdata
        self._recipes[address] = recipe, weakref.ref(y, lambda _: self._recipes.pop(address, None))

    def find(self, tensor):
        """The recipe of exactly this tensor, None if it has none or was changed since."""
        recipe, _ = self._recipes.get(tensor.untyped_storage()._cdata, (None, None))
        return recipe if recipe is not None and recipe.makes(tensor) else None

    def kept(self, tensor):
        """The recipe that recomputes the tensor if there is one, else the stored tensor."""
        return self.find(tensor) or _Kept(tensor)


class _Recipe:
    def __init__(self, z, mean, invstd, bn_weight, bn_bias, spec, y):
        # z is packed already: without a convolution before the norm it is another layer's output
        self._kept = z, *(t if t is None else _Kept(t) for t in (mean, invstd, bn_weight, bn_bias))
        self._spec = spec
        self._made = _identity(y)

    def makes(self, tensor) -> bool:
        return self._made == _identity(tensor)

    def tensor(self) -> torch.Tensor:
        norm = importlib.import_module("rir_kernels.triton.launch.batchnorm")
        z, mean, invstd, gamma, beta = (kept if kept is None else kept.tensor() for kept in self._kept)
        with torch.no_grad():
            statistics = norm.Statistics(mean, None, invstd)
            return norm.bn_apply(z, statistics, gamma=gamma, beta=beta, residuals=(), spec=self._spec)


def _identity(y):
    return y.shape, y.stride(), y.storage_offset(), y.dtype, y._version


class _Kept:
    """A stored tensor with autograd's check that it is not modified, which hooks would bypass."""

    def __init__(self, tensor):
        self._tensor, self._version = tensor, tensor._version

    def tensor(self) -> torch.Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self._tensor.shape)} that backward needs has been modified by an inplace "
                f"operation: it is at version {self._tensor._version}, expected version {self._version}"
            )
        return self._tensor


def _pack(tensor):
    outputs = _current.get()
    return _Kept(tensor) if outputs is None or type(tensor) is not torch.Tensor else outputs.kept(tensor)


def _unpack(kept):
    return kept.tensor()
