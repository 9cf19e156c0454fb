"""Updates running statistics as torch's own norm does."""

import torch

from .tracing import is_plain_eager


def update_running(running_mean, running_var, mean, var, momentum: float, pixels: int) -> None:
    """Updates both in place by the batch's mean and biased variance."""
    # as torch does: in fp32, rounded once to the buffers' dtype; both at once, since each launch matters for a small
    # layer. A plan's kernel (triton.kernels.batchnorm) fuses multiply and add, so it can differ by an ulp
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
    """An alias to write to without a new version, as torch's norm does: other nodes may have saved them for backward.

    Not no_grad: that is a separate region in an exported graph, which torch.export.save refuses. Compilers, tracers
    and transforms refuse `data` or take it for a constant.
    """
    return statistics.data if is_plain_eager() else statistics.detach()
