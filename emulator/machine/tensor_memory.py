"""Tensor memory of some programs that run at once (PTX ISA 9.0, 9.7.16.1)."""

import numpy as np

from . import Fault

ROWS, COLUMNS = 128, 512


class TensorMemory:
    """128 rows ("lanes") of 512 columns of 32 bits for each of some programs; NaN where nobody wrote."""

    def __init__(self, slots: int):
        self.words = np.full((slots, ROWS, COLUMNS), 0xFFFFFFFF, dtype=np.uint32)
        self.is_taken = np.zeros((slots, COLUMNS), dtype=bool)

    def take(self, slot: int, columns: int) -> int:
        """The first of so many that are free."""
        for first in range(0, COLUMNS, columns):
            if not self.is_taken[slot, first : first + columns].any():
                self.is_taken[slot, first : first + columns] = True
                return first
        raise Fault(f"no {columns} columns of tensor memory are free")

    def give_back(self, slot: int, first: int, columns: int) -> None:
        if not self.is_taken[slot, first : first + columns].all():
            raise Fault(f"{columns} columns of tensor memory from {first} on are freed, and not all were taken")
        self.is_taken[slot, first : first + columns] = False
        self.words[slot, :, first : first + columns] = 0xFFFFFFFF
