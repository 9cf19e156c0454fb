"""The fused layer split in two at the batch norm's reduction, where the ranks of a group exchange their statistics.

Each half is a function that `plans` can record: (options, scalars, *tensors) -> tuple of tensors and None. The ranks
exchange rows of `launch.batchnorm.Shared`. Tensors are as in `fused`, in training.
"""

import importlib

from ..backends import fused
from ..common.memory_format import empty_channels_last


def _norm():
    return importlib.import_module("rir_kernels.triton.launch.batchnorm")


def moments(options, _, x, weight, bias, *residuals):
    """Returns (z, or None if z is x; this rank's row). options: spec, impl."""
    spec, impl = options
    conv, _, norm = fused.kernels(impl, weight)
    z, tiles = conv.conv_train(x, weight, bias=bias, residuals=residuals, spec=spec)
    return None if weight is None else z, norm.bn_share(tiles)


def normalize(spec, scalars, z, rows, gamma, beta, running_mean, running_var, batches, *residuals):
    """Returns (y, mean, invstd, number of pixels) from the rows of all ranks. scalars: the momentum."""
    norm = _norm()
    # allocate before the buffers are updated, so an out-of-memory error leaves them untouched
    y, count = empty_channels_last(z.shape, z), rows.new_empty(1)
    after = [norm.evenly_spaced(residual) for residual in residuals] if spec.post_norm else ()
    statistics = norm.bn_finalize(
        norm.Shared(z.shape[1]).moments(rows), spec.eps, count=count,
        running_mean=running_mean, running_var=running_var, batches=batches, momentum=scalars[0],
    )  # fmt: skip
    norm.bn_apply(z, statistics, gamma=gamma, beta=beta, residuals=after, spec=spec, out=y)
    return y, statistics.mean, statistics.invstd, count


def sums(spec, _, dy, z, y, mean, invstd, gamma, beta):
    """Returns (this rank's row,): the sums of dy' and dy' * xhat."""
    norm = _norm()
    per_channel = {"mean": mean, "invstd": invstd, "gamma": gamma, "beta": beta}
    return (norm.bn_share_sums(norm.evenly_spaced(dy), z, y, spec=spec, **per_channel),)


def gradients(options, _, dy, x, weight, z, y, mean, invstd, gamma, beta, rows, count, *norm):
    """Returns the gradients of `fused.backward` from the rows of all ranks; rows is None if no mean is needed.

    options: spec, impl, needs, activation of the upstream layer. norm: that layer's z, mean, invstd, gamma and beta.
    """
    spec, impl, needs, activation = options
    launchers = _norm()
    upstream = launchers.Upstream(*norm, activation) if norm else None
    means = None if rows is None else launchers.bn_sum(launchers.Shared(mean.numel()).sums(rows), 1.0, count)
    # the norm's own gradients are the rank's sums, which are already known
    needs = (*needs[:3], False, False, needs[5])
    found = fused.backward(
        dy, x, weight, z, y, mean, invstd, gamma, beta, spec,
        training=True, needs=needs, impl=impl, upstream=upstream, sums=means, means=means,
    )  # fmt: skip
    return found if upstream is None else (*found[:6], *(found[6] or (None, None)))
