"""Counts the memory that a forward pass leaves to its backward pass."""

import gc
from collections.abc import Callable, Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import rir_kernels  # noqa: F401 (registers our operation)

# what takes long on a CPU, or needs a GPU: of these the outputs' sizes are all that matters here
_LEFT_OUT = (torch.ops.aten.convolution.default, torch.ops.rir_kernels.conv_bn_act.default)


def kept(step: Callable[[], torch.Tensor], there_anyway: Iterable[torch.Tensor]) -> int:
    """Bytes that step() allocates and that are still alive with its result, a loss: what autograd's graph holds.

    Every storage counts once, whole, however many tensors are views of it. The loss and the tensors that are
    `there_anyway` (parameters, buffers, the batch) do not count. Convolutions and our operation allocate their outputs,
    in channels_last, and compute nothing, so the values are meaningless. Tensors may be real ones, or fake ones within
    their mode.
    """
    with _Allocations() as allocations:
        loss = step()
    gc.collect()  # what a cycle of Python's holds would go sooner or later
    return allocations.alive(without=[*there_anyway, loss])


class _Allocations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self._storages = {}

    @classmethod
    def is_infra_mode(cls):
        """torch.compile leaves functions alone within other modes."""
        return True

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        real = FakeTensor not in types
        result = (_left_out(operator) if real and operator in _LEFT_OUT else operator)(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                # the weak reference keeps the address from being used again
                self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return result

    def alive(self, without) -> int:
        excluded = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(
            nbytes
            for address, (storage, nbytes) in self._storages.items()
            if address not in excluded and not storage.expired()
        )


def _left_out(operator):
    """Called like the operator, returns uninitialized tensors of the shapes that its meta implementation says.

    Images among them are channels_last, which the meta implementation of a convolution knows nothing of.
    """

    def like(tensor):
        memory_format = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        return torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=memory_format)

    def call(*args):
        metas = tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
        return tree_map_only(torch.Tensor, like, operator(*metas))

    return call
