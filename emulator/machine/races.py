"""Who wrote and read shared memory, and what was not ordered.

PTX ISA 9.0, 8.7 to 8.9: order and races; 8.2.2: proxies, between which a fence orders. Order comes from bar.sync and
mbarriers, by vector clocks: a warp's clock says, for each warp, up to which step it knows all writes.
"""

import numpy as np

NOBODY = -1


class Shadow:
    """What is known of every two bytes ("halves") of a program's shared memory; `report` is told of each fault."""

    def __init__(self, size: int, warps: int, report):
        halves = size // 2
        self._report = report
        self.valid = np.zeros(halves, dtype=bool)  # written, and no copy to it is in flight
        self._writer, self._written = (np.full(halves, NOBODY, dtype=np.int32) for _ in range(2))  # a warp; its step
        self._read = np.full((warps, halves), NOBODY, dtype=np.int32)  # the step of each warp's last read
        # the warp whose write the asynchronous proxy need not see yet, and whether cp.async made it
        self._unfenced = np.full(halves, NOBODY, dtype=np.int32)
        self._copied = np.zeros(halves, dtype=bool)
        # the mbarrier, and its phase, that say when a TMA load has come (0: there was none)
        self._landed_at, self._landed_in = (np.zeros(halves, dtype=np.int32) for _ in range(2))
        self._is_barrier = np.zeros(halves, dtype=bool)

    def _foreign(self, halves, warp, clock):
        """Where another warp wrote, and that is not known to have come before."""
        writer = self._writer[halves]
        return (writer != NOBODY) & (writer != warp) & (self._written[halves] > clock[np.maximum(writer, 0)])

    def read(self, halves, warp, clock, waited, what, asynchronous=False):
        """`waited`: the phases of each mbarrier that the warp knows to have ended."""
        halves = halves.reshape(-1)
        if not self.valid[halves].all():
            self._report(f"{what} reads shared memory that nobody wrote, or that is in flight")
        if self._foreign(halves, warp, clock).any():
            self._report(f"{what} reads what another warp wrote, unordered")
        at = self._landed_at[halves]
        if ((at > 0) & (waited[at] <= self._landed_in[halves])).any():
            self._report(f"{what} reads a TMA load that its warp has not waited for")
        if asynchronous:
            unfenced = self._unfenced[halves] != NOBODY
            if (unfenced & ~self._copied[halves]).any():
                self._report(f"{what} reads generic writes without a proxy fence")
            elif unfenced.any():  # Triton's own lowering of every pipelined load by pointers
                self._report(f"note: {what} reads what cp.async wrote without a proxy fence")
        self._read[warp, halves] = clock[warp]

    def write(self, halves, warp, clock, what, *, asynchronous=False, valid=True, changed=True, copied=False):
        """`changed`: where the contents differ now; to write what is there already is no race that shows."""
        halves, changed = (a.reshape(-1) for a in np.broadcast_arrays(halves, changed))
        if (self._foreign(halves, warp, clock) & changed).any():
            self._report(f"{what} writes what another warp wrote, unordered")
        late = self._read[:, halves] > clock[:, None]
        late[warp] = False
        if (late.any(0) & changed).any():
            self._report(f"{what} writes what another warp read, unordered")
        if self._is_barrier[halves].any():
            self._report(f"{what} writes over an mbarrier")
        if asynchronous and (self._unfenced[halves] != NOBODY).any():
            self._report(f"{what} overwrites generic writes without a proxy fence")
        self._writer[halves], self._written[halves] = warp, clock[warp]
        self.valid[halves] = valid
        self._unfenced[halves] = NOBODY if asynchronous else warp
        self._copied[halves] = copied
        self._landed_at[halves] = 0

    def land(self, halves, barrier: int, phase: int):
        """A TMA load has come, in that phase of its mbarrier."""
        self.valid[halves] = True
        self._writer[halves] = NOBODY
        self._landed_at[halves], self._landed_in[halves] = barrier, phase

    def place_barrier(self, halves, there: bool):
        self._is_barrier[halves] = there

    def fence(self, warp, clock):
        """fence.proxy.async, by the warp that wrote, or by one that knows of the write."""
        known = self._written <= clock[np.maximum(self._writer, 0)]
        self._unfenced[(self._unfenced == warp) | known] = NOBODY
