"""Loads and stores, of numbers and of matrices, and the copies of cp.async, which happen at once here."""

import contextlib

import numpy as np

from emulator.translate.numbers import LANES

from . import Fault
from .global_memory import WORDS
from .threads import Threads

_NOTHING = contextlib.nullcontext()


class Accesses(Threads):
    def load_global(self, addresses, count, size, m, line):
        return self._masked(m, count, size, lambda which: self.launch.memory.load(addresses[which], count, size, line))

    def store_global(self, addresses, values, size, m, line):
        which = slice(None) if m is None else m
        if len(addresses[which]):
            self.launch.memory.store(addresses[which], [value[which] for value in values], size, line)

    def load_shared(self, addresses, count, size, m, line):
        def load(which):
            index = self.shared.index(addresses[which], self.base[which], count * size, size, line)
            self.reads(index * size, count * size, f"line {line}: ld.shared")
            return [self.shared.words[size][index + part] for part in range(count)]

        return self._masked(m, count, size, load)

    def store_shared(self, addresses, values, size, m, line):
        which = slice(None) if m is None else m
        if not len(addresses[which]):
            return
        index = self.shared.index(addresses[which], self.base[which], len(values) * size, size, line)
        with self.writing(index * size, len(values) * size, f"line {line}: st.shared"):
            for part, value in enumerate(values):
                self.shared.words[size][index + part] = value[which]

    def _masked(self, m, count, size, load):
        """What `load` finds for the threads that take part; zero for others."""
        if m is None:
            return load(slice(None))
        out = [np.zeros(self.width, dtype=WORDS[size]) for _ in range(count)]
        if m.any():
            for whole, part in zip(out, load(m), strict=True):
                whole[m] = part
        return out

    # ldmatrix, stmatrix: lane 8 * i + row points at a row of matrix i, of eight halves

    def _rows(self, addresses, count, m, line):
        """[warps, count, 8]: byte indices of the rows, and the warps that take part."""
        warps = self.whole_warps(m, line)
        rows, bases = (a.reshape(-1, LANES)[warps, : 8 * count] for a in (addresses, self.base))
        return self.shared.index(rows, bases, 16, 1, line).reshape(-1, count, 8), warps

    def load_matrix(self, addresses, count, transposed, m, line):
        rows, warps = self._rows(addresses, count, m, line)
        self.reads(rows.reshape(-1), 16, f"line {line}: ldmatrix")
        matrices = self.shared.words[2][rows[..., None] // 2 + np.arange(8)]
        matrices = np.ascontiguousarray(matrices.swapaxes(2, 3) if transposed else matrices)
        out = np.zeros((count, self.width // LANES, LANES), dtype=np.uint32)
        out[:, warps] = matrices.view(np.uint32).reshape(-1, count, LANES).swapaxes(0, 1)  # lane 4 * row + pair
        return list(out.reshape(count, -1))

    def store_matrix(self, addresses, values, transposed, m, line):
        rows, warps = self._rows(addresses, len(values), m, line)
        lanes = np.stack([value.reshape(-1, LANES)[warps] for value in values], 1)
        matrices = lanes.view(np.uint16).reshape(-1, len(values), 8, 8)
        with self.writing(rows.reshape(-1), 16, f"line {line}: stmatrix"):
            matrices = matrices.swapaxes(2, 3) if transposed else matrices
            self.shared.words[2][rows[..., None] // 2 + np.arange(8)] = matrices

    # cp.async: `given` bytes of the source, and zeros

    def copy(self, targets, sources, size, given, m, line):
        which = np.flatnonzero(self.full(True) if m is None else m)
        if not len(which):
            return
        given = np.full(len(which), size) if given is None else given[which].astype(np.int64)
        if not np.isin(given, (0, size)).all():
            raise Fault(f"line {line}: cp.async of a part of its bytes")
        index = self.shared.index(targets[which], self.base[which], size, 4, line)
        self._copy(index, sources[which], size, given > 0, f"line {line}: cp.async", line)

    def _copy(self, index, sources, size, exists, what, line):
        values = np.zeros((size // 4, len(index)), dtype=np.uint32)
        if exists.any():
            values[:, exists] = self.launch.memory.load(sources[exists], size // 4, 4, line)
        self.shared.words[4][index + np.arange(size // 4)[:, None]] = values

    def copy_commit(self):
        pass

    def copy_wait(self, most):
        pass

    # for those who watch shared memory: byte indices, each of so many bytes

    def reads(self, index, size, what):
        pass

    def writing(self, index, size, what):
        return _NOTHING
