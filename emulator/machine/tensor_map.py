"""TMA's tensor maps (PTX ISA 9.0, 5.5: tensors, tiled mode, swizzling)."""

import struct

import numpy as np

from . import Fault
from .global_memory import WORDS, GlobalMemory

# CUtensorMapDataType: bytes of an element
SIZES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2, 10: 4, 11: 4, 12: 4}
NAN = {6: 0x7FFF, 9: 0x7FFF, 7: 0x7FFFFFFF, 10: 0x7FFFFFFF}
CHUNK = 16  # bytes that swizzling leaves together


class TensorMap:
    """What driver/libcuda.c wrote down of cuTensorMapEncodeTiled's arguments."""

    def __init__(self, raw: bytes):
        words = struct.unpack("16Q", raw)
        self.address = words[0]
        kind, self.rank, self.swizzle, fills_nan = (words[1] >> 8 * byte & 0xFF for byte in range(4))
        self.item = SIZES[kind]
        self.sides = [word & (1 << 40) - 1 for word in words[2 : 2 + self.rank]]  # innermost first, as all here
        self.box = [word >> 40 for word in words[2 : 2 + self.rank]]
        self.strides = [self.item, *words[8 : 8 + self.rank - 1]]  # bytes
        self.bytes = self.item * int(np.prod(self.box))
        self._fill = NAN.get(kind, 0) if fills_nan else 0
        row = self.box[0] * self.item
        if self.swizzle and row > 16 << self.swizzle:
            raise Fault(f"a TMA box whose rows of {row} bytes are longer than its swizzle")
        if row % CHUNK:
            raise Fault(f"a TMA box whose rows of {row} bytes are no multiple of 16")
        self._order = swizzled(np.arange(0, self.bytes, CHUNK), self.swizzle)

    def order(self, base: int):
        """Where the box's chunks lie in shared memory, as byte addresses, if the box begins at `base`."""
        if base % 128 or (self.swizzle and base % (128 << self.swizzle)):
            raise Fault(f"a TMA box at {base:#x}, where its swizzle does not begin")  # it is of address bits
        return self._order + base

    def read(self, memory: GlobalMemory, coordinates: list[int]):
        """The box, as chunks; zeros, or NaN, where it leaves the tensor."""
        box = np.full(self.box[::-1], self._fill, dtype=WORDS[self.item])
        view, inside = self._clip(memory, coordinates, False)
        if view is not None:
            box[inside] = view
        return box.reshape(-1).view(np.complex128)

    def write(self, memory: GlobalMemory, coordinates: list[int], chunks) -> None:
        view, inside = self._clip(memory, coordinates, True)
        if view is not None:
            view[...] = chunks.view(WORDS[self.item]).reshape(self.box[::-1])[inside]

    def _clip(self, memory, coordinates, writes):
        """(view of what of the box is in the tensor, where in the box that is), outermost first."""
        address, shape, inside = self.address, [], []
        for first, side, length, stride in zip(coordinates, self.sides, self.box, self.strides, strict=True):
            low, high = max(0, first), min(side, first + length)
            if low >= high:
                return None, None
            address += low * stride
            shape.append(high - low)
            inside.append(slice(low - first, high - first))
        return memory.box(address, shape[::-1], self.strides[::-1], self.item, writes), tuple(inside[::-1])


def swizzled(address, mode: int):
    """Bits 4 and up, as many as the mode says, exclusive-or those from bit 7."""
    return address ^ ((address >> 3) & ((1 << mode) - 1) << 4) if mode else address
