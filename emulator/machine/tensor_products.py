"""tcgen05: products whose sums lie in tensor memory (PTX ISA 9.0, 9.7.16)."""

import numpy as np

from emulator.ptx import Unsupported
from emulator.translate.numbers import LANES, multiply

from . import Fault
from .matrices import matrix_of_tcgen05
from .products import Products
from .tensor_memory import COLUMNS

HALF_ROWS = np.arange(64) // 16 * 32 + np.arange(64) % 16  # where the rows of a product of 64 lie
KINDS = {("kind::f16", 0): "f16", ("kind::f16", 1): "bf16", ("kind::tf32", 2): "tf32"}


class TensorProducts(Products):
    def sums_take(self, targets, columns, m, line):
        """The address goes to shared memory."""
        for warp in np.flatnonzero(self.whole_warps(m, line)):
            address = self.shared.tensor.take(self.slot[LANES * warp], columns)
            first_lane = np.arange(self.width) == LANES * warp
            self.store_shared(targets, [self.full(np.uint32(address))], 4, first_lane, line)

    def sums_give_back(self, addresses, columns, m, line):
        for warp in np.flatnonzero(self.whole_warps(m, line)):
            self.shared.tensor.give_back(self.slot[LANES * warp], int(addresses[LANES * warp]), columns)

    def _cells(self, addresses, count, shape, split, m, line):
        """The threads that take part, (program, row, column) of their words [threads, count], and what is wrong."""
        warps = np.flatnonzero(self.whole_warps(m, line))
        threads = (LANES * warps[:, None] + np.arange(LANES)).reshape(-1)
        row, column = addresses[threads] >> np.uint32(16), addresses[threads] & np.uint32(0xFFFF)
        lane = self.lane[threads]
        if shape == "16x32bx2":  # the upper half of a warp has other columns of the same rows
            column, within = column + np.where(lane >= 16, np.uint32(split), np.uint32(0)), lane % 16
        elif shape == "32x32b":
            within = lane
        else:
            raise Unsupported(f"line {line}: the shape {shape}")
        cells = self.slot[threads, None], (row + within)[:, None], column[:, None] + np.arange(count)
        wrong = self._not_allocated(cells)
        if (row // 32 != self.tid[threads] // LANES % 4).any() or (row % 32 + within >= 32).any():
            wrong = "rows of tensor memory that another warp of four has access to"
        return threads, cells, f"line {line}: {wrong}" if wrong else ""

    def _not_allocated(self, cells):
        programs, _, columns = cells
        if (columns < COLUMNS).all() and self.shared.tensor.is_taken[programs, columns].all():
            return ""
        return "columns of tensor memory that were not allocated"

    def sums_load(self, *args):
        self._sums_load(*args)()

    def _sums_load(self, targets, addresses, shape, split, m, line):
        """What does it. The registers are other ones from now on.

        Sums that are not there are NaN, and no fault: Triton 3.6 loads those of a part -1 too, and uses them nowhere.
        """
        threads, cells, wrong = self._cells(addresses, len(targets), shape, split, m, line)
        after = np.full((len(targets), self.width), 0xFFFFFFFF, dtype=np.uint32)
        if len(threads) < self.width:
            after[...] = np.stack([self.registers[index] for index in targets])
            after[:, threads] = 0xFFFFFFFF
        for index, values in zip(targets, after, strict=True):
            self.registers[index] = values

        def load():
            after[:, threads] = self.shared.tensor.words[cells].T

        if wrong:
            self.note(f"{wrong} are loaded")
            return lambda: None
        return load

    def sums_store(self, *args):
        self._sums_store(*args)()

    def _sums_store(self, addresses, values, shape, split, m, line):
        threads, cells, wrong = self._cells(addresses, len(values), shape, split, m, line)
        if wrong:
            raise Fault(wrong)
        words = np.stack([value[threads] for value in values], axis=1)

        def store():
            self.shared.tensor.words[cells] = words

        return store

    def sums_wait(self, what):
        """For this warp's loads, or stores."""

    def sums_product(self, *args):
        if len(self._those(args[-2])):
            self._sums_product(*args)()

    def _sums_product(self, addresses, a, b, description, adds, kind, m, line):
        """D (+)= A B, by one thread of a program, as an instruction descriptor says (9.7.16.4.2)."""
        threads = self._those(m)
        adds = np.broadcast_to(adds, self.width)
        asked = np.stack([addresses[threads], description[threads], adds[threads].astype(np.uint32)], axis=1)
        kinds, which = np.unique(asked, axis=0, return_inverse=True)  # one, as a rule, of all programs
        works = [
            self._one_product(threads[which.reshape(-1) == number], *asked_for, a, b, kind, line)
            for number, asked_for in enumerate(kinds.tolist())
        ]
        return lambda: [work() for work in works]

    def _one_product(self, threads, address, description, adds, a, b, kind, line):
        rows, columns, numbers, a_transposed, b_transposed = described(description, kind, line)
        bases = self.base[threads]
        left = self.matrix((a[threads], bases), matrix_of_tcgen05, numbers, rows, a_transposed, line)
        right = self.matrix((b[threads], bases), matrix_of_tcgen05, numbers, columns, b_transposed, line)
        first, column = address >> 16, address & 0xFFFF
        if first not in ((0, 16) if rows == 64 else (0,)):
            raise Fault(f"line {line}: a product of {rows} rows from row {first} of tensor memory on")
        places = first + (HALF_ROWS if rows == 64 else np.arange(rows))
        cells = self.slot[threads][:, None, None], places[None, :, None], column + np.arange(columns)
        if wrong := self._not_allocated(cells):
            raise Fault(f"line {line}: {wrong}")

        def compute():
            total = multiply(self.numbers(left, numbers).swapaxes(1, 2), self.numbers(right, numbers))
            if adds:
                total = total + self.shared.tensor.words[cells].view(np.float32)
            self.shared.tensor.words[cells] = total.astype(np.float32).view(np.uint32)

        return compute

    def sums_commit(self, barriers, m, line):
        """An arrival when this thread's products so far are there."""
        self.barrier_arrive(barriers, None, m, line)


def described(description, kind, line):
    """(rows, columns, kind of number, whether A and B are transposed)."""
    fields = {name: description >> start & (1 << bits) - 1 for name, start, bits in
              (("sums", 4, 2), ("a", 7, 3), ("b", 10, 3), ("columns", 17, 6), ("rows", 24, 5))}  # fmt: skip
    known = 3 << 4 | 7 << 7 | 7 << 10 | 1 << 15 | 1 << 16 | 63 << 17 | 31 << 24
    numbers = KINDS.get((kind, fields["a"]))
    rows = 16 * fields["rows"]
    if description & ~known or fields["sums"] != 1 or fields["a"] != fields["b"] or numbers is None:
        raise Unsupported(f"line {line}: the instruction descriptor {description:#x} with {kind}")
    if rows not in (64, 128):
        raise Unsupported(f"line {line}: a product of {rows} rows")
    return rows, 8 * fields["columns"], numbers, description >> 15 & 1, description >> 16 & 1
