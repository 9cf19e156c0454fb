"""CUDA graphs: what their warm-up leaves behind, and what they cannot hold."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def preserved_statistics(*modules: nn.Module) -> Iterator[None]:
    """Within it forwards may run; at its end every buffer of the modules is what it was before, in place.

    Capturing a CUDA graph takes forwards to warm up, which in training would count as batches:

        with rir.preserved_statistics(model):
            model = torch.cuda.make_graphed_callables(model, (x,))

    Restored are the values (running statistics, num_batches_tracked, and whatever else is a buffer), in their own
    memory, where a captured graph will update them at each replay; and the tensor itself where it was replaced by
    another. Also after an exception. Parameters and gradients are not looked after.

    In a captured graph norms have the momentum they were captured with, and none may have momentum=None: that one is
    computed from the number of batches, which the host would have to read. Capturing it raises RuntimeError.

    TypeError for what is no nn.Module.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"preserved_statistics takes modules, got {type(module).__name__}")
    owned = [
        (owner, name, buffer)
        for owner in {id(m): m for module in modules for m in module.modules()}.values()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    values = {id(buffer): buffer.detach().clone() for _, _, buffer in owned}
    try:
        yield
    finally:
        for device in {buffer.device for _, _, buffer in owned if buffer.is_cuda}:
            torch.cuda.synchronize(device)  # warm-ups run on streams of their own
        for owner, name, buffer in owned:
            owner._buffers[name] = buffer
            buffer.detach().copy_(values[id(buffer)])


def check_host_may_read(what: str) -> None:
    """RuntimeError within the capture of a CUDA graph, where `what` would need a number from the device."""
    # asked first: without a GPU there is no second question
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} reads the number of batches on the host, which the capture of a CUDA graph does not allow, and "
            "a replay would repeat the captured average: set a momentum"
        )
