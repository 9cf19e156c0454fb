"""CUDA graphs: restore buffers after the warm-up, and refuse what cannot be captured."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def preserved_statistics(*modules: nn.Module) -> Iterator[None]:
    """Restores all buffers of the modules, in place, on exit.

    Capturing a CUDA graph takes warm-up forwards, which in training would update the running statistics:

        with rir.preserved_statistics(model):
            model = torch.cuda.make_graphed_callables(model, (x,))

    Restores the values (running statistics, num_batches_tracked and every other buffer) in their own memory, where a
    captured graph updates them at each replay, and puts back a buffer that was replaced by another tensor. It does so
    after an exception, too. Parameters and gradients are not restored.

    A captured graph keeps the momentum that the norms had at capture. No norm may have momentum=None, which is
    computed from the number of batches: the host would have to read it, so capturing raises RuntimeError.

    Raises TypeError for anything but an nn.Module.
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
            torch.cuda.synchronize(device)  # warm-ups run on other streams
        for owner, name, buffer in owned:
            owner._buffers[name] = buffer
            buffer.detach().copy_(values[id(buffer)])


def check_host_may_read(what: str) -> None:
    """Raises RuntimeError during the capture of a CUDA graph, where `what` would have to read from the device."""
    # is_initialized comes first: without a GPU the second query must not run
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} reads the number of batches on the host, which the capture of a CUDA graph does not allow, and "
            "a replay would repeat the captured average: set a momentum"
        )
