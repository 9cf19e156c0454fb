"""The timing that a program must stand: what is asynchronous happens as late as it may, each warp runs by itself.

TMA loads land at the last wait for them (after some in vain), products and their reads of shared memory happen when
wait_group retires them, or when their commit's mbarrier is waited for (tcgen05), TMA stores read when wait_group.read
does, cp.async and copies of tensor memory land at their own wait.
"""

import contextlib
import functools

import numpy as np

from . import Fault
from .global_memory import WatchedMemory
from .lockstep import released
from .races import Shadow
from .shared import Shared
from .tensor_map import CHUNK
from .tensor_products import TensorProducts
from .threads import LANES, Launch

NAN = np.uint32(0xFFFFFFFF)


def run(launch: Launch, shared: int, seed: int, seen: dict[str, int]) -> None:
    """All programs, in an order that the seed decides. `seen` gets what is reported, and a program that did it."""
    for program in map(int, np.random.default_rng(seed).permutation(launch.programs)):
        report = functools.partial(_report, seen, program)
        if isinstance(launch.memory, WatchedMemory):
            launch.memory.report, launch.memory.program = report, program
        try:
            with np.errstate(all="ignore"):
                _Program(launch, shared, program, np.random.default_rng([seed, program]), report).run()
        except Fault as fault:
            raise Fault(f"{launch.kernel.program.name}, program {program}: {fault}") from fault


def _report(seen, program, text):
    seen.setdefault(text, program)


class _Program:
    def __init__(self, launch, shared, program, random, report):
        warps = launch.kernel.program.threads // LANES
        self.shared = _Shared(shared)
        self.shadow = Shadow(self.shared.stride, warps, report)
        self.random, self.report = random, report
        self.warps = [_Warp(self, launch, program, warp, warps) for warp in range(warps)]

    def run(self):
        vain = 0
        while running := [warp for warp in self.warps if not warp.has_ended]:
            ready = [warp for warp in running if warp.barrier[0] < 0]
            if not ready:
                raise Fault("deadlock at bar.sync")
            warp, settled = ready[self.random.integers(len(ready))], self.shared.settled
            warp.run()
            if not warp.retry() or settled < self.shared.settled:
                vain = 0
            elif (vain := vain + 1) > 1000 * len(ready):
                raise Fault(f"deadlock: warps {[w.first for w in ready]} wait for mbarriers")
            released(self.warps)
        if any(self.shared.loads.values()):
            self.report("ends with TMA loads or products in flight")
        if any(self.shared.products):
            self.report("ends with products in flight that no commit covers")
        if self.shared.tensor.is_taken.any():
            self.report("ends with tensor memory that it has not given back")
        for warp in self.warps:
            warp.finish()


class _Shared(Shared):
    """Knows the TMA loads in flight, and what those knew who arrived at an mbarrier."""

    def __init__(self, size):
        super().__init__(1, size)
        self.loads: dict[int, list] = {}  # mbarrier: what lands there
        self.commits: dict[int, int] = {}  # how much of that arrives when it does
        self.vain: dict[int, int] = {}  # so many looks in vain until then
        self.products: list[list] = [[]]  # of tensor memory, in flight: those that a commit covers; at last the others
        self.arrived: dict[int, tuple] = {}  # (clock, waited) of all who arrived
        self.ended: dict[int, tuple] = {}  # the same at the end of the last phase

    def settle(self, index):
        before = self.phase[index].copy()
        super().settle(index)
        for barrier in map(int, index[self.phase[index] > before]):
            if barrier in self.arrived:
                self.ended[barrier] = self.arrived[barrier]


class _Warp(TensorProducts):
    def __init__(self, program: _Program, launch, number, warp, warps):
        super().__init__(launch, program.shared, range(number, number + 1), warp, 1)
        self._program, self._shadow = program, program.shadow
        self._clock = np.zeros(warps, dtype=np.int32)
        self._clock[warp] = 1
        self._waited = np.zeros_like(program.shared.phase)
        self._open: dict[str, list] = {"copy": [], "bulk": [], "product": []}  # not committed yet
        self._groups: dict[str, list] = {"copy": [], "bulk": [], "product": []}
        self._sums: dict[str, list] = {"ld": [], "st": []}  # copies of tensor memory

    def note(self, text):
        self._program.report(f"note: {text}")

    # order

    def _join(self, clock, waited):
        self._clock, self._waited = np.maximum(self._clock, clock), np.maximum(self._waited, waited)

    def _step(self):
        self._clock = self._clock.copy()
        self._clock[self.first] += 1

    def met(self, groups):
        known = [(group._clock, group._waited) for group in groups]
        if self is groups[0]:  # once for all of them
            clock, waited = (np.maximum.reduce(parts) for parts in zip(*known, strict=True))
            for group in groups:
                group._join(clock, waited)
                group._step()

    def fence_async(self, m):
        self._shadow.fence(self.first, self._clock)

    def barrier_init(self, addresses, counts, m, line):
        super().barrier_init(addresses, counts, m, line)
        for thread in self._those(m):
            halves = self._halves(addresses[thread : thread + 1].astype(np.int64), 8)
            self._shadow.write(halves, self.first, self._clock, f"line {line}: mbarrier.init")
            self._shadow.place_barrier(halves, True)

    def barrier_invalidate(self, addresses, m, line):
        super().barrier_invalidate(addresses, m, line)
        for thread in self._those(m):
            if self.shared.loads.get(int(addresses[thread]) // 8):
                self._program.report(f"line {line}: mbarrier.inval while TMA loads are in flight")
            self._shadow.place_barrier(self._halves(addresses[thread : thread + 1].astype(np.int64), 8), False)

    def barrier_arrive(self, addresses, sizes, m, line):
        for thread in self._those(m):
            self._comes(int(addresses[thread]) // 8)
        super().barrier_arrive(addresses, sizes, m, line)
        self._step()

    def _comes(self, barrier):
        """Who waits for the mbarrier will know what this warp knows now."""
        clock, waited = self.shared.arrived.get(barrier, (self._clock, self._waited))
        self.shared.arrived[barrier] = np.maximum(clock, self._clock), np.maximum(waited, self._waited)

    def barrier_test(self, addresses, parities, m, line):
        for barrier in map(int, np.unique(addresses[self._those(m)] // 8)):
            loads = self.shared.loads.get(barrier)
            if loads and self.shared.pending[barrier] == self.shared.commits[barrier]:
                if self.shared.vain[barrier]:
                    self.shared.vain[barrier] -= 1
                else:
                    self.shared.loads[barrier], self.shared.commits[barrier] = [], 0
                    for land in loads:
                        land()
        ended = super().barrier_test(addresses, parities, m, line)
        for barrier in map(int, np.unique(addresses[ended] // 8)):
            if barrier in self.shared.ended:
                self._join(*self.shared.ended[barrier])
            self._waited = self._waited.copy()
            self._waited[barrier] = self.shared.phase[barrier]
        return ended

    # shared memory

    @staticmethod
    def _halves(index, size):
        return index.reshape(-1, 1) // 2 + np.arange(max(1, size // 2))

    def reads(self, index, size, what, asynchronous=False):
        self._shadow.read(self._halves(index, size), self.first, self._clock, self._waited, what, asynchronous)

    def reads_matrix(self, index, size, line):
        self.reads(index, size, f"line {line}: a product", True)

    @contextlib.contextmanager
    def writing(self, index, size, what):
        halves = self._halves(index, size)
        before = self.shared.words[2][halves]
        yield
        changed = self.shared.words[2][halves] != before
        self._shadow.write(halves, self.first, self._clock, what, changed=changed)

    # what is asynchronous: kept until a group that holds it is waited for

    def _commit(self, kind):
        self._groups[kind].append(self._open[kind])
        self._open[kind] = []

    def _retired(self, kind, most):
        done = max(0, len(self._groups[kind]) - most)
        retired, self._groups[kind] = self._groups[kind][:done], self._groups[kind][done:]
        return [work for group in retired for work in group]

    def _copy(self, index, sources, size, exists, what, line):
        halves = self._halves(4 * index, size)
        self._shadow.write(halves, self.first, self._clock, what, valid=False)
        self.shared.words[4][index + np.arange(size // 4)[:, None]] = NAN
        land = functools.partial(super()._copy, index, sources, size, exists, what, line)

        def landed():
            land()
            self._shadow.write(halves, self.first, self._clock, what, copied=True)

        self._open["copy"].append(landed)

    def copy_commit(self):
        self._commit("copy")

    def copy_wait(self, most):
        for landed in self._retired("copy", most):
            landed()

    def tensor_load(self, addresses, maps, coordinates, barriers, m, line):
        if not len(which := self._those(m)):
            return
        index = self.shared.barriers(barriers[which], self.base[which], line).tolist()
        boxes = self.boxes(maps, coordinates, addresses, which, line)
        for barrier, (tensor, where, chunks) in zip(index, boxes, strict=True):
            halves = self._halves(chunks, CHUNK)
            what = f"line {line}: TMA load"
            self._shadow.write(halves, self.first, self._clock, what, asynchronous=True, valid=False)
            self.shared.words[2][halves] = 0xFFFF
            phase = int(self.shared.phase[barrier])
            self._lands_at(barrier, functools.partial(self._land, tensor, where, chunks, halves, barrier, phase))

    def _lands_at(self, barrier, land):
        if not self.shared.loads.get(barrier):
            self.shared.loads[barrier], self.shared.commits[barrier] = [], 0
            self.shared.vain[barrier] = int(self._program.random.integers(4 * len(self._program.warps)))
        self.shared.loads[barrier].append(land)

    def _land(self, tensor, where, chunks, halves, barrier, phase):
        self.shared.words[CHUNK][chunks // CHUNK] = tensor.read(self.launch.memory, where)
        self._shadow.land(halves.reshape(-1), barrier, phase)
        self.shared.complete(np.array([barrier]), tensor.bytes)

    def tensor_store(self, maps, coordinates, addresses, m, line):
        if not len(which := self._those(m)):
            return
        for tensor, where, chunks in self.boxes(maps, coordinates, addresses, which, line):
            self.reads(chunks, CHUNK, f"line {line}: TMA store", True)
            self._open["bulk"].append(_Store(self, tensor, where, chunks))

    def bulk_commit(self):
        self._commit("bulk")

    def bulk_wait(self, most, reads):
        groups = self._groups["bulk"]
        for group in groups[: max(0, len(groups) - most)]:
            for store in group:
                store.read() if reads else store.finish()

    def product(self, *args):
        line, m = args[-1], args[-2]
        _, a, b, _, kind, columns, a_transposed, b_transposed = args[:8]
        # shared memory may be read from now on: it must be there already
        leaders = np.flatnonzero(self.whole_warps(m, line))
        self._right(b, leaders, kind, columns, b_transposed, line)
        if not isinstance(a, list):
            self._left(a, leaders, kind, a_transposed, line)
        self._open["product"].append(self._product(*args))

    def product_commit(self):
        self._commit("product")

    def product_wait(self, most):
        for compute in self._retired("product", most):
            compute()

    def sums_take(self, *args):
        super().sums_take(*args)
        # the manual names no proxy for the address; once it is read Triton lets TMA overwrite it without a fence
        self.fence_async(None)

    def sums_load(self, *args):
        self._sums["ld"].append(self._sums_load(*args))

    def sums_store(self, *args):
        self._sums["st"].append(self._sums_store(*args))

    def sums_wait(self, what):
        for work in self._sums[what]:
            work()
        self._sums[what] = []

    def sums_product(self, *args):
        if len(self._those(args[-2])):
            self.shared.products[-1].append(self._sums_product(*args))

    def sums_commit(self, barriers, m, line):
        if not len(which := self._those(m)):
            return
        for barrier in self.shared.barriers(barriers[which], self.base[which], line).tolist():
            self._comes(barrier)
            self._lands_at(barrier, functools.partial(self._products_land, self.shared.products[-1], barrier))
            self.shared.commits[barrier] += 1
            self.shared.products.append([])
        self._step()

    def _products_land(self, covered, barrier):
        """These, and those before them, which run in order."""
        while any(covered is products for products in self.shared.products):
            for work in self.shared.products.pop(0):
                work()
        self.shared.arrive(np.array([barrier]), 0)

    def finish(self):
        """The program has ended."""
        if any(self._sums.values()):
            self._program.report("ends with copies of tensor memory in flight")
        if self._open["product"] or self._groups["product"]:
            self._program.report("ends with matrix products in flight")
        for group in self._groups["bulk"]:
            for store in group:
                if not store.has_read:
                    self._program.report("ends before TMA stores have read shared memory")
                store.finish()


class _Store:
    """A TMA store in flight."""

    def __init__(self, warp, tensor, where, chunks):
        self._warp, self._tensor, self._where, self._chunks = warp, tensor, where, chunks
        self._values = None
        self._is_done = False

    @property
    def has_read(self):
        return self._values is not None

    def read(self):
        if self._values is None:
            self._values = self._warp.shared.words[CHUNK][self._chunks // CHUNK]

    def finish(self):
        self.read()
        if not self._is_done:
            self._tensor.write(self._warp.launch.memory, self._where, self._values)
            self._is_done = True
