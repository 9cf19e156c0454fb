"""The processes of one training: one alone, or those that `torchrun` started."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from .errors import SettingsError


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def part(self, batch_size: int) -> tuple[int, int]:
        """(start, stop) of this rank's images within a batch."""
        if batch_size % self.world:
            raise SettingsError(
                f"a batch of {batch_size} images cannot be shared by {self.world} ranks: take a multiple of that"
            )
        share = batch_size // self.world
        return self.rank * share, (self.rank + 1) * share

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all ranks; a new tensor."""
        total = tensor.clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def any(self, flags: Sequence[bool], device) -> list[bool]:
        """Whether each is set on some rank; every rank has to ask."""
        if self.world == 1:
            return list(flags)
        return [count > 0 for count in self.sum(torch.tensor([*map(int, flags)], device=device)).tolist()]

    def share_buffers(self, module: nn.Module) -> None:
        """Those of the first rank, to all of them."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks of this run and the device that is this process's; what was started is ended.

    device: "cpu", "cuda" or None, which is a GPU where there is one. With several ranks a GPU is taken for each, by
    torchrun's LOCAL_RANK. SettingsError where that device is not there.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda":
        if local >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise SettingsError(f"rank {local} of this machine needs a GPU of its own, and {found} are here")
        place = torch.device("cuda", local if place.index is None else place.index)
        torch.cuda.set_device(place)
    if world == 1:
        yield Ranks(), place
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), place
    finally:
        dist.destroy_process_group()


def leave(status: int) -> None:
    """Ends the process with that exit status.

    One of several ranks ends at once: DDP keeps gloo's threads alive (torch 2.13), and one that asks for Python's lock
    while Python comes to its end aborts the process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
