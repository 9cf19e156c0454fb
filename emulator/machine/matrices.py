"""Operands of tensor cores that lie in shared memory, as matrix descriptors say (PTX ISA 9.0, 9.7.15.5, 9.7.16.4)."""

from typing import NamedTuple

import numpy as np

from emulator.ptx import Unsupported
from emulator.translate.numbers import LANES, operand_values

from . import Fault
from .asynchronous import Asynchronous
from .tensor_map import swizzled


class Matrix(NamedTuple):
    """Where its canonical pieces lie: eight rows of 16 bytes, or of as many as the swizzle is long."""

    start: int
    leading: int
    stride: int
    bits: int  # of the address that are swizzled: 0 to 3, for 128 bytes


_OFFSETS = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32


def matrix_of_wgmma(descriptor: int) -> Matrix:
    return _matrix(descriptor, 0, 3 << 62, {0: 0, 1: 3, 2: 2, 3: 1}, 62)


def matrix_of_tcgen05(descriptor: int) -> Matrix:
    return _matrix(descriptor, 1 << 46, 7 << 61, {0: 0, 2: 3, 4: 2, 6: 1}, 61)


def _matrix(descriptor, fixed, swizzle, bits, place):
    kind = (descriptor & swizzle) >> place
    if descriptor & ~(_OFFSETS | swizzle) != fixed or kind not in bits:
        raise Unsupported(f"matrix descriptor {descriptor:#x}")
    return Matrix(*((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32)), bits[kind])


def size_of(kind: str) -> int:
    """Bytes of an element."""
    return 4 if kind == "tf32" else 2


class Matrices(Asynchronous):
    def of_warps(self, descriptors, leaders, line):
        """Descriptors, and where shared memory begins, of these warps, in each of which all lanes have the same."""
        lanes = descriptors.reshape(-1, LANES)
        values = lanes[leaders, 0]
        if (lanes[leaders] != values[:, None]).any():
            raise Fault(f"line {line}: matrix descriptors differ within a warp")
        return values, self.base.reshape(-1, LANES)[leaders, 0]

    def matrix(self, given, decode, kind, size, transposed, line, first=None):
        """[several, k, size]: indices of its elements in shared memory, for (descriptors, where that begins);
        `first`: 16 rows from there."""
        item = size_of(kind)
        values, bases = given
        out = np.empty((len(values), 32 // item, size if first is None else 16), dtype=np.int64)
        for value in np.unique(values):
            which = values == value
            out[which] = bases[which, None, None] // item + self._index(
                int(value), decode, item, size, transposed, line, first
            )
        self.reads_matrix(out * item, item, line)
        return out

    def numbers(self, index, kind):
        return operand_values(self.shared.words[size_of(kind)][index], kind)

    def _index(self, descriptor, decode, item, size, transposed, line, first):
        key = descriptor, item, size, transposed, first
        known = self.launch.kernel.operands
        if key not in known:
            index = matrix_index(decode(descriptor), item, size, transposed)
            if index.min() < 0 or (index.max() + 1) * item > self.shared.size:
                raise Fault(f"line {line}: a matrix beyond shared memory")
            known[key] = index if first is None else index[:, first : first + 16]
        return known[key]

    def reads_matrix(self, index, size, line):
        """For those who watch shared memory."""


def matrix_index(matrix: Matrix, item: int, size: int, transposed: int):
    """[k, size]: where the elements of `size` rows of A, or columns of B, and 32 bytes of k lie."""
    start, leading, stride, bits = matrix
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
