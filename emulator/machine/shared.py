"""Shared memory of some programs that run at once, and the mbarriers in it (PTX ISA 9.0, 9.7.13: mbarrier)."""

import functools

import numpy as np

from emulator.translate.code import SHARED

from . import Fault
from .global_memory import WORDS
from .tensor_memory import TensorMemory


class Shared:
    """`slots` times SHARED + size bytes, one after the other; what nobody wrote is NaN."""

    def __init__(self, slots: int, size: int):
        self.size = SHARED + size  # addresses of a program end here
        self.stride = -(-self.size // 1024) * 1024  # so that an address is swizzled alike in every slot
        raw = np.full(slots * self.stride, 0xFF, dtype=np.uint8)
        self.words = {width: raw.view(word) for width, word in WORDS.items()} | {16: raw.view(np.complex128)}
        # of the mbarrier in each eight bytes: arrivals it was made for (0: none is there), those to come in this phase,
        # bytes to come, phases that have ended
        self.count, self.pending, self.bytes, self.phase = (np.zeros(len(raw) // 8, dtype=np.int64) for _ in range(4))
        self.settled = 0  # phases that have ended, of all
        self._slots = slots

    @functools.cached_property
    def tensor(self) -> TensorMemory:
        return TensorMemory(self._slots)

    def index(self, addresses, bases, size: int, word: int, line: int):
        """Indices of words of `word` bytes, where accesses of `size` bytes begin."""
        if (addresses % np.uint32(size)).any():
            raise Fault(f"line {line}: misaligned shared access of {size} bytes")
        low, high = int(addresses.min()), int(addresses.max()) + size
        if low < SHARED or high > self.size:
            raise Fault(f"line {line}: shared access at {low:#x} to {high:#x}, beyond {SHARED:#x} to {self.size:#x}")
        return (addresses + bases) // word

    def barriers(self, addresses, bases, line: int):
        """Indices of mbarriers that are there."""
        index = self.index(addresses, bases, 8, 8, line)
        if not self.count[index].all():
            raise Fault(f"line {line}: no mbarrier at {int(addresses[self.count[index] == 0][0]):#x}")
        return index

    def init(self, addresses, bases, counts, line: int) -> None:
        index = self.index(addresses, bases, 8, 8, line)
        if self.count[index].any():
            raise Fault(f"line {line}: an mbarrier is there already")
        self.count[index] = self.pending[index] = counts
        self.bytes[index] = 0
        self.phase[index] += self.phase[index] & 1  # even, as a first phase is; and higher than where one was before

    def arrive(self, index, sizes) -> None:
        """One arrival each, at mbarriers that expect as many bytes more."""
        np.subtract.at(self.pending, index, 1)
        np.add.at(self.bytes, index, sizes)
        self.settle(index)

    def complete(self, index, sizes) -> None:
        """So many bytes have come."""
        np.subtract.at(self.bytes, index, sizes)
        self.settle(index)

    def settle(self, index) -> None:
        """Ends the phase of those for which nothing more is to come."""
        if (self.pending[index] < 0).any():
            raise Fault("more arrivals than an mbarrier was made for")
        ended = np.unique(index[(self.pending[index] == 0) & (self.bytes[index] == 0)])
        self.phase[ended] += 1
        self.pending[ended] = self.count[ended]
        self.settled += len(ended)
