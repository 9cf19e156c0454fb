"""Launches the fixed-order sum of partial results."""

from rir_kernels.triton.cost import cdiv
from rir_kernels.triton.launch.runtime import device_guard, launch
from rir_kernels.triton.partials import _sum_partials_kernel


def sum_partials(partial, out, *, scale=1.0) -> None:
    """out = scale * partial.sum(0); `out` is dense in the memory order of partial[0], any float dtype."""
    splits, size = partial.shape[0], partial[0].numel()
    block = 256
    with device_guard(out):
        launch(
            _sum_partials_kernel, cdiv(size, block), partial, out, splits, size, float(scale),
            BLOCK_S=16, BLOCK=block,
        )  # fmt: skip
