"""Merges the statistics of a process group's ranks: one gather, and Chan's formula in rank order.

`Ranks` merges with torch's operators; `KernelRanks` with the kernels that ranks with images run (bit-identical).
"""

import importlib

import torch


class Ranks:
    """The ranks of a group, during one call and its backward."""

    def __init__(self, group):
        self._group = group
        # over all ranks; var is biased, count a tensor: reading it would synchronize
        self.mean: torch.Tensor
        self.var: torch.Tensor
        self.count: torch.Tensor

    def merge(self, mean, var, count: int, eps: float):
        """Returns (mean, biased var, invstd) over all ranks, from those of the `count` local pixels."""
        channels = mean.numel()
        rows = self.gather(torch.cat([mean, var * count, mean.new_full((1,), count)])).view(-1, 2 * channels + 1)
        means, m2s, counts = rows.split([channels, channels, 1], dim=1)
        self.count = counts.sum()
        # deviations from the mean of a rank that has pixels: sums of small numbers, although the means may be large
        anchor = means.index_select(0, counts.argmax(0))
        shifts = means - anchor
        shift = (counts * shifts).sum(0) / self.count
        self.mean = anchor[0] + shift
        self.var = (m2s + counts * (shifts - shift).square()).sum(0) / self.count
        return self.mean, self.var, (self.var + eps).rsqrt()

    def means(self, sums):
        """Turns each sum over this rank's pixels into the mean over the pixels of all ranks."""
        row = torch.cat(sums)
        return (self.gather(row).view(-1, row.numel()).sum(0) / self.count).chunk(len(sums))

    def gather(self, row):
        """Concatenates the rows of all ranks; sums over them have a fixed order, an all-reduce that of its backend."""
        rows = row.new_empty(self._group.size() * row.numel())
        if row.is_meta:  # kernels are being compiled ahead of time
            return rows
        distributed = torch.distributed
        # the name until 2.12, and the one since
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        gather(rows, row, group=self._group)
        return rows

    @torch.no_grad()
    def update_running(self, running_mean, running_var, momentum) -> None:
        """Updates them, if given, as torch.nn.functional.batch_norm does; no change if no rank had a pixel."""
        if running_mean is None:
            return
        unbiased = self.var * (self.count / (self.count - 1).clamp(min=1))  # torch's SyncBatchNorm: NaN for one pixel
        moved = [
            torch.where(self.count > 0, (1 - momentum) * buffer.to(batch.dtype) + momentum * batch, buffer)
            for buffer, batch in ((running_mean, self.mean), (running_var, unbiased))
        ]
        running_mean.copy_(moved[0])  # after the last allocation: both or none
        running_var.copy_(moved[1])


class KernelRanks(Ranks):
    """A rank without images among ranks that run kernels: it takes part in both exchanges."""

    def __init__(self, group, channels):
        super().__init__(group)
        self._norm = importlib.import_module("rir_kernels.triton.launch.batchnorm")
        self._shared = self._norm.Shared(channels)
        self._rows = None

    def merge(self, mean, var, count, eps):
        """Returns the statistics of the other ranks, since this one has no pixel."""
        self._rows = self.gather(mean.new_zeros(self._shared.width))
        self.count = mean.new_empty(1)
        statistics = self._norm.bn_finalize(self._shared.moments(self._rows), eps, count=self.count)
        return statistics.mean, statistics.var, statistics.invstd

    def means(self, sums):
        rows = self.gather(sums[0].new_zeros(2 * self._shared.pitch))
        return self._norm.bn_sum(self._shared.sums(rows), 1.0, self.count)

    def update_running(self, running_mean, running_var, momentum) -> None:
        if running_mean is not None:
            self._norm.bn_finalize(
                self._shared.moments(self._rows), 0.0, running_mean=running_mean, running_var=running_var,
                momentum=momentum,
            )  # fmt: skip
