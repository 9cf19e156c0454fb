"""Running statistics, updated as torch's own norm does it."""

import torch

from .tracing import is_plain_eager


def update_running(running_mean, running_var, mean, var, momentum: float, pixels: int) -> None:
    """In place, by the batch's mean and biased variance."""
    # as torch does it, in fp32, rounded once to the buffers' dtype; both at a time, since every launch counts beside a
    # small layer. A plan's kernel (triton.batchnorm) fuses product and sum: an ulp apart at times
    running = [values(running_mean), values(running_var)]
    batch = torch._foreach_mul([mean.detach(), var.detach()], [momentum, momentum * pixels / (pixels - 1)])
    if mean.dtype == running_mean.dtype == running_var.dtype:
        torch._foreach_mul_(running, 1 - momentum)
        torch._foreach_add_(running, batch)
    else:
        updated = [buffer.float() * (1 - momentum) + share for buffer, share in zip(running, batch, strict=True)]
        for buffer, value in zip(running, updated, strict=True):
            buffer.copy_(value)


def values(statistics):
    """To be written to without a new version, as torch's norm does it: others may keep them for their backward.

    Not by no_grad, a region of its own in an exported graph, which torch.export.save refuses. Compilers, tracers and
    transforms refuse `data`, or take it for a constant.
    """
    return statistics.data if is_plain_eager() else statistics.detach()
