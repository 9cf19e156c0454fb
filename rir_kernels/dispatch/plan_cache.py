"""Fast path of an eager call: found by its signature, it replays what an earlier call recorded.

What a call is checked for, which implementation it gets and what that launches depend on its tensors' metadata only:
shapes, strides, dtypes, alignment. So the first call with a signature is checked, and leaves a runner for the ones
after it. Only our own kernels ("triton") can be planned. Whatever watches or transforms operators (torch.compile,
torch.func, dispatch modes, torch.jit.trace) sees the registered op, which has plans too (`plans`).
"""

import torch

from ..autograd import runners
from ..backends import plans
from ..common.call import Call
from ..common.devices import on_gpu
from ..distributed import sync_statistics
from .preference import effective_impl

_planned = plans.Kinds()  # signature: a runners.Planned, or None where there can be no plan


def signature(call: Call, impl: str, torch_format: bool) -> tuple | None:
    """What calls that can share a plan have in common, None where this one may have none.

    torch_format: whose rule the output's memory format follows.
    """
    if impl == "auto":
        impl = effective_impl(impl)
    # "auto" never means our kernels off the GPU: nothing to look up there
    may_launch = impl == "triton" or (impl == "auto" and isinstance(call.x, torch.Tensor) and on_gpu(call.x))
    if not may_launch or type(call.momentum) is not float:
        return None
    inputs = call.inputs()
    metadata = plans.metadata(inputs + call.buffers())
    # torch counts batches wherever the counter lies, a kernel on its own device only
    counter = call.num_batches_tracked
    if metadata is None or (counter is not None and counter.device != call.x.device):
        return None
    saves = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs])
    return (*metadata, call.spec, call.training, torch_format, saves, impl)


def find(signature: tuple, process_group) -> runners.Planned | sync_statistics.KernelsOfRanks | None:
    """What ran an earlier call with this signature, None where there was none."""
    return _planned.get(signature) if process_group is None else sync_statistics.find(signature, process_group)


def plan(signature: tuple, call: Call, channels_last: bool) -> runners.Planned | None:
    """The plan of calls with this signature, this one checked; None where there can be none.

    channels_last: the output's format, of which a signature has one.
    """
    if signature not in _planned:
        _planned.remember(signature, runners.planned(call, call.needs_grad(), channels_last))
    return _planned[signature]
