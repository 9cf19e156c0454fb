"""Global memory: what a launch may touch, and who wrote it."""

import bisect
import ctypes

import numpy as np

from . import Fault

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class GlobalMemory:
    """Allocations, (address, bytes) each, which are memory of this process."""

    def __init__(self, allocations):
        sizes: dict[int, int] = {}
        for address, size in allocations:
            sizes[address] = max(size, sizes.get(address, 0))
        self._starts = sorted(address for address, size in sizes.items() if size)
        self._sizes = sizes
        self._table = np.array(self._starts, dtype=np.uint64)
        self._views = {
            start: {size: raw[: len(raw) // size * size].view(word) for size, word in WORDS.items()}
            for start, raw in ((start, _bytes(start, sizes[start])) for start in self._starts)
        }

    def segment(self, low: int, high: int) -> tuple[int, dict]:
        """(start, views by size of word) of the allocation that holds the bytes from low to high."""
        index = bisect.bisect_right(self._starts, low) - 1
        if index < 0 or high > self._starts[index] + self._sizes[self._starts[index]]:
            raise Fault(f"global access at {low:#x} to {high:#x}, beyond what the launch was given")
        return self._starts[index], self._views[self._starts[index]]

    def load(self, addresses, count: int, size: int, line: int) -> list:
        """`count` words of `size` bytes from each address."""
        out = [np.empty(len(addresses), dtype=WORDS[size]) for _ in range(count)]
        for start, views, which in self._parts(addresses, count * size, line):
            self._touch(start, addresses[which], count * size, False, line)
            index = ((addresses[which] - np.uint64(start)) // np.uint64(size)).astype(np.int64)
            for part in range(count):
                out[part][which] = views[size][index + part]
        return out

    def store(self, addresses, values: list, size: int, line: int) -> None:
        for start, views, which in self._parts(addresses, len(values) * size, line):
            self._touch(start, addresses[which], len(values) * size, True, line)
            index = ((addresses[which] - np.uint64(start)) // np.uint64(size)).astype(np.int64)
            for part, value in enumerate(values):
                views[size][index + part] = value[which]

    def box(self, address: int, shape, strides, item: int, writes: bool):
        """A strided view of words of `item` bytes: the part of a TMA box that lies in its tensor."""
        extent = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)) + item
        start, views = self.segment(address, address + extent)
        if (address - start) % item:
            raise Fault("a misaligned tensor")
        return np.ndarray(shape, WORDS[item], views[1], address - start, strides)

    def _parts(self, addresses, size, line):
        """(start, views, which of the addresses) of each allocation that they lie in."""
        if (addresses % np.uint64(size)).any():
            raise Fault(f"line {line}: misaligned global access of {size} bytes")
        low, high = int(addresses.min()), int(addresses.max())
        if bisect.bisect_right(self._starts, low) == bisect.bisect_right(self._starts, high):
            return [self._part(low, high + size, slice(None), line)]
        index = np.searchsorted(self._table, addresses, side="right")
        groups = [index == value for value in np.unique(index)]
        return [self._part(int(addresses[g].min()), int(addresses[g].max()) + size, g, line) for g in groups]

    def _part(self, low, high, which, line):
        try:
            return *self.segment(low, high), which
        except Fault as fault:
            raise Fault(f"line {line}: {fault}") from None

    def _touch(self, start, addresses, size, writes, line):
        """For those who watch."""


def _bytes(address, size):
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=np.uint8)


class WatchedMemory(GlobalMemory):
    """Reports what one program writes and another touches: programs run in any order, and at once."""

    def __init__(self, allocations, report):
        super().__init__(allocations)
        self.report, self.program = report, 0
        self._owners = {start: np.full(self._sizes[start] // 2 + 1, -1, dtype=np.int32) for start in self._starts}

    def box(self, address, shape, strides, item, writes):
        view = super().box(address, shape, strides, item, writes)
        start = self._starts[bisect.bisect_right(self._starts, address) - 1]
        # every two bytes have an owner, four bytes each: that of a word's first two speaks for the word
        strides = [2 * stride for stride in strides]
        owners = np.ndarray(shape, np.int32, self._owners[start], (address - start) // 2 * 4, strides)
        self._check(owners, writes, "a TMA box")
        if writes:
            owners[...] = self.program
        return view

    def _touch(self, start, addresses, size, writes, line):
        halves = ((addresses - np.uint64(start)) // np.uint64(2)).astype(np.int64)[:, None] + np.arange(
            max(1, size // 2)
        )
        self._check(self._owners[start][halves], writes, f"line {line}:")
        if writes:
            self._owners[start][halves] = self.program

    def _check(self, owners, writes, what):
        if ((owners >= 0) & (owners != self.program)).any():
            # a read may be of what is not used then: as programs run in a random order, it shows in the result if it is
            how, note = ("writes", "") if writes else ("reads", "note: ")
            self.report(f"{note}{what} {how} global memory that another program wrote")
