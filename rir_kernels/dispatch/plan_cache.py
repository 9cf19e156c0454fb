"""Fast path of an eager call: replays the launch plan that an earlier call with the same signature recorded.

A call's checks, its implementation and the launches depend only on its tensors' metadata: shapes, strides, dtypes,
alignment. So the first call with a signature is checked, and stores a runner for later ones. Only our own kernels
("triton") can be planned. Whatever watches or transforms operators (torch.compile, torch.func, dispatch modes,
torch.jit.trace) sees the registered op, which has plans too (`plans`).
"""

import torch

from ..autograd import runners
from ..backends import plans
from ..common.call import Call
from ..common.devices import on_gpu
from ..distributed import sync_statistics
from .preference import effective_impl

_planned = plans.Kinds()  # signature -> runners.Planned, or None if no plan is possible


def signature(call: Call, impl: str, torch_format: bool) -> tuple | None:
    """The key that calls sharing a plan have in common, None if this call cannot have one.

    torch_format: whether the output's memory format follows torch's rule.
    """
    if impl == "auto":
        impl = effective_impl(impl)
    # off the GPU "auto" never chooses our kernels: nothing to look up
    may_launch = impl == "triton" or (impl == "auto" and isinstance(call.x, torch.Tensor) and on_gpu(call.x))
    if not may_launch or type(call.momentum) is not float:
        return None
    metadata = plans.metadata(call.inputs() + call.buffers())
    # torch increments a counter on any device, a kernel only one on its own device
    counter = call.num_batches_tracked
    if metadata is None or (counter is not None and counter.device != call.x.device):
        return None
    return (*metadata, call.spec, call.training, torch_format, call.needs_grad(), impl)


def find(signature: tuple, process_group) -> runners.Planned | sync_statistics.KernelsOfRanks | None:
    """The runner of an earlier call with this signature, None if there was none."""
    return _planned.get(signature) if process_group is None else sync_statistics.find(signature, process_group)


def plan(signature: tuple, call: Call, channels_last: bool) -> runners.Planned | None:
    """Returns the plan of calls with this signature, this call already checked; None if no plan is possible.

    channels_last: the output's format, which the signature determines.
    """
    if signature not in _planned:
        _planned.remember(signature, runners.planned(call, call.needs_grad(), channels_last))
    return _planned[signature]
