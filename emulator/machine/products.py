"""wgmma: products of four warps, whose operands are matrices in shared memory (PTX ISA 9.0, 9.7.15)."""

import numpy as np

from emulator.translate.numbers import LANES, fragment, multiply, sums_to_registers

from . import Fault
from .matrices import Matrices, matrix_of_wgmma

WARPS = 4  # of a warp group


class Products(Matrices):
    def product(self, sums, a, b, adds, kind, columns, a_transposed, b_transposed, m, line):
        """The registers `sums` become A B, and what they were where `adds`."""
        work = self._product(sums, a, b, adds, kind, columns, a_transposed, b_transposed, m, line)
        work()

    def _product(self, sums, a, b, adds, kind, columns, a_transposed, b_transposed, m, line):
        """What computes it. The registers are other ones from now on, whose contents it sets."""
        warps = np.flatnonzero(self.whole_warps(m, line))
        lanes = (LANES * warps[:, None] + np.arange(LANES)).reshape(-1)
        if len(sums) != columns // 2:
            raise Fault(f"line {line}: {len(sums)} registers for {columns} columns of sums")
        adds = np.broadcast_to(adds, self.width)[lanes]
        if adds.any() != adds.all():
            raise Fault(f"line {line}: scale-d differs between threads")
        together = min(WARPS, self.width // LANES)  # one, where each warp runs by itself
        leaders = warps[::together]
        if len(warps) % together or (warps.reshape(-1, together) != leaders[:, None] + np.arange(together)).any():
            raise Fault(f"line {line}: a part of a warp group")
        inputs = [self.registers[index] for index in sums]  # of a product that may be in flight itself
        after = np.full((len(sums), self.width), 0xFFFFFFFF, dtype=np.uint32)  # NaN until it is there
        for index, row in zip(sums, after, strict=True):
            self.registers[index] = row

        def compute():
            before = np.stack(inputs)
            if len(lanes) < self.width:
                after[...] = before
            if isinstance(a, list):
                left = fragment([part[lanes] for part in a], kind, 2)
            else:
                left = self.numbers(self._left(a, leaders, kind, a_transposed, line), kind).swapaxes(1, 2)
            left = left.reshape(len(leaders), 16 * together, -1)
            right = self.numbers(self._right(b, leaders, kind, columns, b_transposed, line), kind)
            total = sums_to_registers(multiply(left, right).reshape(len(warps), 16, columns))
            if adds.all():
                total = total + before.view(np.float32)[:, lanes]
            after.view(np.float32)[:, lanes] = total

        return compute

    def _left(self, descriptors, leaders, kind, transposed, line):
        """64 rows for each warp group, or its own 16 of them where a warp runs by itself."""
        first = None if self.width >= WARPS * LANES else int(16 * ((self.first + leaders[0]) % WARPS))
        given = self.of_warps(descriptors, leaders, line)
        return self.matrix(given, matrix_of_wgmma, kind, 64, transposed, line, first)

    def _right(self, descriptors, leaders, kind, columns, transposed, line):
        return self.matrix(self.of_warps(descriptors, leaders, line), matrix_of_wgmma, kind, columns, transposed, line)

    def product_commit(self):
        pass

    def product_wait(self, most):
        pass
