"""mbarriers and TMA, whose loads land at once here."""

import numpy as np

from . import Fault
from .accesses import Accesses
from .tensor_map import CHUNK


class Asynchronous(Accesses):
    def _those(self, m):
        return np.arange(self.width) if m is None else np.flatnonzero(m)

    def barrier_init(self, addresses, counts, m, line):
        if len(which := self._those(m)):
            self.shared.init(addresses[which], self.base[which], counts[which], line)

    def barrier_invalidate(self, addresses, m, line):
        if len(which := self._those(m)):
            self.shared.count[self.shared.barriers(addresses[which], self.base[which], line)] = 0

    def barrier_arrive(self, addresses, sizes, m, line):
        if len(which := self._those(m)):
            index = self.shared.barriers(addresses[which], self.base[which], line)
            self.shared.arrive(index, 0 if sizes is None else sizes[which].astype(np.int64))

    def barrier_test(self, addresses, parities, m, line):
        """Whether the phase of that parity has ended."""
        which = self._those(m)
        ended = np.zeros(self.width, dtype=bool)
        if not len(which):
            return ended
        index = self.shared.barriers(addresses[which], self.base[which], line)
        ended[which] = (self.shared.phase[index] & 1) != (parities[which] & 1)
        if not ended[which].all():
            self._failed = ~ended if m is None else m & ~ended
        return ended

    def fence_async(self, m):
        pass

    def boxes(self, maps, coordinates, addresses, which, line):
        """(tensor map, coordinates, byte indices of the box's chunks in shared memory) of each thread's copy."""
        self.shared.index(addresses[which], self.base[which], CHUNK, CHUNK, line)  # for what it refuses
        places = zip(*(axis[which].tolist() for axis in coordinates), strict=True)
        several = zip(maps[which].tolist(), places, addresses[which].tolist(), self.base[which].tolist(), strict=True)
        for number, where, address, base in several:
            tensor = self.launch.tensor_map(number)
            if address + tensor.bytes > self.shared.size:
                raise Fault(f"line {line}: a TMA box at {address:#x}, beyond shared memory")
            yield tensor, where, tensor.order(address) + base

    def tensor_load(self, addresses, maps, coordinates, barriers, m, line):
        if not len(which := self._those(m)):
            return
        index = self.shared.barriers(barriers[which], self.base[which], line)
        sizes = []
        for tensor, where, chunks in self.boxes(maps, coordinates, addresses, which, line):
            self.shared.words[CHUNK][chunks // CHUNK] = tensor.read(self.launch.memory, where)
            sizes.append(tensor.bytes)
        self.shared.complete(index, sizes)

    def tensor_store(self, maps, coordinates, addresses, m, line):
        if len(which := self._those(m)):
            for tensor, where, chunks in self.boxes(maps, coordinates, addresses, which, line):
                tensor.write(self.launch.memory, where, self.shared.words[CHUNK][chunks // CHUNK])

    def bulk_commit(self):
        pass

    def bulk_wait(self, most, reads):
        pass
