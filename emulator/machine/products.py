"""wgmma: products of four warps, whose operands are matrices in shared memory (PTX ISA 9.0, 9.7.15)."""

import numpy as np

from emulator.ptx import Unsupported
from emulator.translate.numbers import LANES, fragment, multiply, operand_values, sums_to_registers

from . import Fault
from .asynchronous import Asynchronous
from .tensor_map import swizzled

WARPS = 4  # of a warp group


class Products(Asynchronous):
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
            right = self.operand(b, leaders, kind, columns, b_transposed, None, line)
            if isinstance(a, list):
                left = fragment([part[lanes] for part in a], kind, 2)
            else:
                left = self.operand(a, leaders, kind, 64, a_transposed, together, line).swapaxes(1, 2)
            left = left.reshape(len(leaders), 16 * together, -1)
            total = sums_to_registers(multiply(left, right).reshape(len(warps), 16, columns))
            if adds.all():
                total = total + before.view(np.float32)[:, lanes]
            after.view(np.float32)[:, lanes] = total

        return compute

    def operand(self, descriptors, leaders, kind, size, transposed, together, line):
        """[warp groups, k, size] as their matrix descriptors say; `together`: the rows of so many warps only."""
        item = 4 if kind == "tf32" else 2
        lanes = descriptors.reshape(-1, LANES)
        values = lanes[leaders, 0]
        if (lanes[leaders] != values[:, None]).any():
            raise Fault(f"line {line}: matrix descriptors differ within a warp")
        bases = self.base.reshape(-1, LANES)[leaders, 0] // item
        rows = None if together in (None, WARPS) else (self.first + leaders[0]) % WARPS
        out = None
        for value in np.unique(values):
            index = self._index(int(value), kind, size, transposed, rows, line)
            which = values == value
            flat = bases[which, None, None] + index
            self.reads_matrix(flat * item, item, line)
            part = operand_values(self.shared.words[item][flat], kind)
            if which.all():
                return part
            out = np.empty((len(leaders), *index.shape), dtype=np.float32) if out is None else out
            out[which] = part
        return out

    def _index(self, descriptor, kind, size, transposed, rows, line):
        key = descriptor, kind, size, transposed, rows
        known = self.launch.kernel.operands
        if key not in known:
            item = 4 if kind == "tf32" else 2
            index = matrix_index(descriptor, item, size, transposed)
            if index.min() < 0 or (index.max() + 1) * item > self.shared.size:
                raise Fault(f"line {line}: a matrix beyond shared memory")
            known[key] = index if rows is None else index[:, 16 * rows : 16 * rows + 16]
        return known[key]

    def reads_matrix(self, index, size, line):
        """For those who watch shared memory."""

    def product_commit(self):
        pass

    def product_wait(self, most):
        pass


def matrix_index(descriptor: int, item: int, size: int, transposed: int):
    """[k, size]: where the elements of `size` rows of A, or columns of B, and 32 bytes of k lie.

    9.7.15.5: matrix descriptors; the canonical layouts are eight rows of 16 bytes, or as long as the swizzle is.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    known = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62
    if descriptor & ~known:
        raise Unsupported(f"matrix descriptor {descriptor:#x}")
    bits = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]  # swizzled: no, 128, 64, 32 bytes
    span = 16 << bits
    m, k = np.arange(size), np.arange(32 // item)
    if transposed and item != 2:
        raise Unsupported("a transposed matrix of 32 bits")
    if transposed and bits:
        wide = span // item
        across, down = m % wide * item + m // wide * leading, k % 8 * span + k // 8 * stride
    elif transposed:
        across, down = m % 8 * item + m // 8 * stride, k % 8 * 16 + k // 8 * leading
    elif bits:
        across, down = m % 8 * span + m // 8 * stride, k * item
    else:
        across, down = m % 8 * 16 + m // 8 * stride, k * item % 16 + k * item // 16 * leading
    return swizzled(start + across[None, :] + down[:, None], bits) // item
