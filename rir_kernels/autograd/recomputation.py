"""Half of the activations kept: a layer's output is made again, in backward, from what the layer itself has saved.

A layer keeps z, from which its own gradients are made; the layer after it keeps y = act(norm(z)), its input. Within
`recompute` that y is not kept: backward makes it again, by one pass over z, with the same kernel and the same bits.
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
    """Within it, outputs of fused layers that an operation saves for backward are computed again when it runs.

        with rir.recompute():
            loss = criterion(model(images), labels)
        loss.backward()

    It saves one activation a layer and costs one pass over memory; gradients keep their bits. It concerns eager calls
    of our kernels (impl "triton" and "hybrid") in this thread, whoever consumes their outputs. Kept as ever is the
    output of a layer with a residual after its norm: z alone does not tell it.

    Raises RuntimeError in backward where a tensor that is needed was changed in place, as autograd does.
    """
    token = _current.set(_Outputs())
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _current.reset(token)


def remember(y, z, mean, invstd, bn_weight, bn_bias, spec) -> None:
    """Called for an output y = act(norm(z)) with whatever it is made of; does nothing outside `recompute`."""
    outputs = None if torch.compiler.is_compiling() else _current.get()
    if outputs is not None:
        outputs.add(y, _Recipe(outputs.kept(z), mean, invstd, bn_weight, bn_bias, spec, y))


def saves_in_place(z) -> bool:
    """Whether z, saved for backward, stays where it is: it may be made again, or moved by other hooks, to a CPU say."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is None or (hooks == (_pack, _unpack) and type(_pack(z)) is _Kept)


class _Outputs:
    """The recipes of the outputs that are still alive, by their memory: autograd may save an alias of them."""

    def __init__(self):
        self._recipes = {}

    def add(self, y, recipe):
        address = y.untyped_storage()._cdata
        self._recipes[address] = recipe, weakref.ref(y, lambda _: self._recipes.pop(address, None))

    def find(self, tensor):
        """The recipe of this very tensor, None where it has none or was changed since."""
        recipe, _ = self._recipes.get(tensor.untyped_storage()._cdata, (None, None))
        return recipe if recipe is not None and recipe.makes(tensor) else None

    def kept(self, tensor):
        """What makes the tensor again where something does, else the tensor."""
        return self.find(tensor) or _Kept(tensor)


class _Recipe:
    def __init__(self, z, mean, invstd, bn_weight, bn_bias, spec, y):
        # z is kept already: it is another layer's output where no convolution is in front of the norm
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
    """A tensor as it is, and autograd's check that it stays so: hooks would do without it."""

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
