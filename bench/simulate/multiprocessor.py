"""One multiprocessor, event by event: every instruction of every resident warp group, in the order of its issue.

A warp group's four warps sit on the four schedulers and do the same at the same time, so one warp of each group on one
scheduler stands for all.
"""

import heapq
from dataclasses import dataclass

from bench.simulate.disassembly import NONE, CannotModel
from bench.simulate.machine import Machine
from bench.simulate.program import Warp
from bench.simulate.state import Barrier, Cta, Group, Kernel

MOST_INSTRUCTIONS = 6_000_000
_CAUSES = {"wgmma": "wgmma queue", "wgmma wait": "wgmma wait", "copy wait": "stores", "try wait": "TRYWAIT"}
_PARKED = -1.0  # until another group's doing puts it back


@dataclass
class Run:
    clocks: float
    tensor: float  # clocks that the tensor core was busy
    loop_tensor: float  # of these in the main loop
    written: float  # bytes, through pointers
    ctas: list[Group]  # the first warp group of each, with what it spent


def simulate(kernel: Kernel, machine: Machine, queues: list[list[int]]) -> Run:
    """An SM with a place for each of `queues`, which hold the CTAs that follow each other there.

    CannotModel where the kernel does what is not known.
    """
    if kernel.warps % 4:
        raise CannotModel(f"{kernel.warps} warps are no whole warp groups")
    return _Multiprocessor(kernel, machine, queues).run()


class _Multiprocessor:
    def __init__(self, kernel, machine, queues):
        self.kernel, self.machine, self.queues = kernel, machine, queues
        self.code = kernel.code
        self.latencies = [getattr(machine, item.latency) for item in self.code.decoded]
        self.heap, self.pushed, self.issued, self.running = [], 0, 0, 0
        self.now = self.issue_free = self.tensor_free = self.load_free = self.store_free = 0.0
        self.backlog = 0.0  # clocks of arrivals in shared memory that products have not yet waited for
        self.result = Run(0.0, 0.0, 0.0, 0.0, [])
        self.waits = {
            "wgmma": self._wait_for_queue, "wgmma wait": self._wait_for_products, "copy wait": self._wait_for_copies,
            "try wait": self._wait_for_phase, "barrier": self._wait_at_barrier, "unknown": self._refuse,
        }  # fmt: skip
        self.acts = {
            "wgmma": self._multiply, "load": self._load, "store": self._store, "arrive": self._arrive,
            "barrier init": self._make_barrier, "copy": self._copy, "commit": self._commit,
            "branch": self._branch, "return": self._return, "exit": self._exit,
        }  # fmt: skip

    def run(self) -> Run:
        for slot, queue in enumerate(self.queues):
            if queue:
                self._begin(50.0 * slot, slot, 0)
        group = None
        while self.heap:
            self.now, _, group = heapq.heappop(self.heap)
            self._step(group)
        if self.running:
            text = self.code.decoded[group.at].ins.text
            raise CannotModel(f"all warps wait for each other, the last at `{text}` (instruction {group.at})")
        return self.result

    def _push(self, time, group):
        self.pushed += 1  # of equal times the first
        heapq.heappush(self.heap, (time, self.pushed, group))

    def _begin(self, time, slot, turn):
        cta = Cta(self.queues[slot][turn], slot, turn, self.kernel.warps)
        self.running += 1
        groups = []
        for first in range(0, self.kernel.warps, 4):
            warps = [Warp(cta, 32 * warp, self.kernel.constants) for warp in range(first, first + 4)]
            groups.append(Group(cta, warps))
            self._push(time + 0.75 * first, groups[-1])
        cta.first = groups[0]

    def _delay(self, group, item, until, cause):
        group.spent[item.phase, cause] += until - self.now
        self._push(until, group)

    def _step(self, group):
        """One instruction of a group, if it can be issued now."""
        if group.ahead:
            self._meet_again(group)
        item, now = self.code.decoded[group.at], self.now
        if item.ins.waits:
            last = max(item.ins.waits, key=group.boards.__getitem__)
            if group.boards[last] > now:
                setter = self.code.decoded[group.setters[last]]
                self._delay(group, item, group.boards[last], "wait: " + setter.group)
                return
        doing = group.warps
        if item.kind != "plain":
            doing = [warp for warp in group.warps if self._runs(warp, group.at, item)]
            if doing and item.kind in self.waits:
                until = self.waits[item.kind](group, item, doing)
                if until > now:
                    self._delay(group, item, until, _CAUSES[item.kind])
                if until > now or until == _PARKED:
                    return
        if self.issue_free > now:
            self._delay(group, item, self.issue_free, "other warps issue")
            return
        self._issue(group, item, doing)

    def _issue(self, group, item, doing):
        now, machine, ins, index = self.now, self.machine, item.ins, group.at
        self.issue_free = now + 1.0
        self.issued += 1
        if self.issued > MOST_INSTRUCTIONS:
            raise CannotModel(f"more than {MOST_INSTRUCTIONS} instructions: a loop without an end?")
        after = now + ins.stall
        if index not in group.seen:
            group.seen.add(index)
            if item.phase != 1:
                after += machine.fetch
        group.passed = False
        group.at = index + 1
        if item.follows:
            for warp in group.warps:
                warp.run(self.code.program, index, ins.guard)
        if item.written:
            self.result.written += item.written * sum(warp.holds(ins.guard) is not False for warp in group.warps)
        if item.kind != "plain" and doing:
            group.counts[item.phase, item.kind] += len(doing) if item.kind in ("load", "store") else 1
            if item.kind in self.acts:
                self.acts[item.kind](group, item, doing)
                if not group.warps and not group.ahead:
                    return
        if ins.sets != NONE:
            group.boards[ins.sets], group.setters[ins.sets] = now + self.latencies[index], index
        if ins.reads != NONE and now + machine.operand_read > group.boards[ins.reads]:
            group.boards[ins.reads], group.setters[ins.reads] = now + machine.operand_read, index
        if item.group == "shared memory":
            after = max(after, now + machine.shared_issue)
        self._delay(group, item, after, "issue: " + item.group)

    def _runs(self, warp, index, item):
        """Whether an instruction that must be understood runs in a warp."""
        runs = warp.holds(item.ins.guard)
        if runs is not None:
            return runs
        if item.kind != "branch":
            raise CannotModel(f"`{item.ins.text}` (instruction {index}) runs by a predicate that is not followed")
        # of floats, one side of which is a rare case in a subroutine: the other one
        taken, not_taken = self.code.leads_to_call(item.target), self.code.leads_to_call(index + 1)
        if taken == not_taken:
            raise CannotModel(f"the branch at instruction {index} depends on tensors' contents")
        return not_taken

    # what an instruction waits for: until when, or _PARKED

    def _refuse(self, group, item, _doing):
        raise CannotModel(f"`{item.ins.text}` (instruction {group.at})")

    def _wait_for_queue(self, group, _item, _doing):
        group.queue = [start for start in group.queue if start > self.now]
        depth = self.machine.wgmma_depth
        return group.queue[-depth] if len(group.queue) >= depth else self.now

    def _wait_for_products(self, group, item, _doing):
        if len(group.groups) <= item.count:
            return self.now
        return group.groups[len(group.groups) - item.count - 1] + self.machine.wgmma_pipe + self.machine.wake

    def _wait_for_copies(self, group, item, _doing):
        return group.commits[len(group.commits) - item.count - 1] if len(group.commits) > item.count else self.now

    def _wait_for_phase(self, group, item, doing):
        barrier = self._barrier(doing[0], item.where[0])
        if len(barrier.ended) & 1 == doing[0].read(item.where[1]) >> 31 & 1:  # the phase is not over
            barrier.waiters.append((self.now, group))
            return _PARKED
        late = barrier.ended and barrier.ended[-1] > self.now
        return barrier.ended[-1] + 0.5 * self.machine.trywait if late else self.now

    def _wait_at_barrier(self, group, item, _doing):
        if group.passed:
            return self.now
        group.passed = True
        group.cta.arrived.append((self.now, group))
        self._meet(group.cta)
        return _PARKED

    def _meet(self, cta):
        """Lets go who waits at the barrier, where all are there."""
        if sum(len(group.warps) for _, group in cta.arrived) < cta.live:
            return
        release = max((time for time, _ in cta.arrived), default=0.0) + self.machine.barrier
        for time, group in cta.arrived:
            group.spent[self.code.decoded[group.at].phase, "BAR"] += release - time
            self._push(release, group)
        cta.arrived = []

    # what an instruction does when it is issued

    def _multiply(self, group, item, _doing):
        machine, result = self.machine, self.result
        start = max(self.tensor_free, self.now + machine.wgmma_issue)
        computing, reading = item.columns / 2, (item.left_bytes + item.columns * 32) / machine.shared_rate
        self.backlog = max(0.0, self.backlog - max(0.0, start - self.tensor_free))
        lasts = max(computing, reading)
        self.backlog = max(0.0, self.backlog - (lasts - reading))
        self.tensor_free = start + lasts + max(0.0, self.backlog - machine.shared_backlog)
        self.backlog = min(self.backlog, machine.shared_backlog)
        result.tensor += computing
        result.loop_tensor += computing * (item.phase == 1)
        group.queue.append(start)
        if "gsb0" in item.ins.text:  # it ends a group of products
            group.groups = [*group.groups[-15:], self.tensor_free]

    def _load(self, _group, item, doing):
        for warp in doing:
            descriptor, *corner, where = item.where
            box, corner = self._box(warp, descriptor), list(map(warp.read, corner))
            rate = self.machine.l2_rate
            self.load_free = max(self.load_free + self.machine.tma_gap, self.now) + box.inside(corner) / rate
            self.backlog += box.bytes / self.machine.shared_rate
            barrier = self._barrier(warp, where)
            latency = self.machine.late_latency if item.phase == 2 else self.machine.tma_latency
            barrier.ready = max(barrier.ready, self.load_free + latency)
            barrier.bytes -= box.bytes
            self._settle(barrier)

    def _store(self, group, item, doing):
        for warp in doing:
            box, corner = self._box(warp, item.where[0]), list(map(warp.read, item.where[1:]))
            self.store_free = max(self.store_free, self.now) + box.inside(corner) / self.machine.store_rate
            group.copying = self.store_free + self.machine.store_latency

    def _copy(self, group, _item, _doing):
        group.copying = max(group.copying, self.now + self.machine.global_load)

    def _commit(self, group, _item, _doing):
        group.commits = [*group.commits[-15:], group.copying]
        group.copying = 0.0

    def _make_barrier(self, group, item, doing):
        for warp in doing:
            count = 0x100000 - (warp.read(item.where[1]) >> 1)
            group.cta.barriers[warp.read(item.where[0]) & 0xFFFFFFFF] = Barrier(count, count)

    def _arrive(self, _group, item, doing):
        for warp in doing:
            barrier = self._barrier(warp, item.where[0])
            barrier.bytes += warp.read(item.where[1])
            barrier.left -= 1
            barrier.ready = max(barrier.ready, self.now)
            self._settle(barrier)

    def _settle(self, barrier):
        """Ends the phase where nothing is missing."""
        if barrier.left or barrier.bytes:
            return
        barrier.ended.append(barrier.ready)
        barrier.left = barrier.expected
        for parked, waiter in barrier.waiters:
            time = max(parked, barrier.ready + 0.5 * self.machine.trywait)
            self._push(time, waiter)
            waiter.spent[self.code.decoded[waiter.at].phase, "TRYWAIT"] += time - parked
        barrier.waiters = []

    def _branch(self, group, item, doing):
        if len(doing) == len(group.warps):
            group.at = item.target
            return
        if item.target < group.at:
            raise CannotModel(f"warps of one warp group part at `{item.ins.text}`, backwards")
        group.ahead[item.target] = group.ahead.get(item.target, []) + doing
        group.warps = [warp for warp in group.warps if warp not in doing]

    def _meet_again(self, group):
        group.warps = sorted(group.warps + group.ahead.pop(group.at, []), key=lambda warp: warp.first_thread)
        if any(target < group.at for target in group.ahead):
            raise CannotModel(f"warps of one warp group do not meet again before instruction {group.at}")

    def _return(self, group, item, doing):
        (group.at,) = {warp.read(item.where[0]) for warp in doing}

    def _exit(self, group, _item, doing):
        cta = group.cta
        self.result.clocks = max(self.result.clocks, self.now)
        cta.live -= len(doing)
        group.warps = [warp for warp in group.warps if warp not in doing]
        if cta.live:
            self._meet(cta)
            return
        self.running -= 1
        self.result.ctas.append(cta.first)
        if cta.turn + 1 < len(self.queues[cta.slot]):
            self._begin(self.now + self.machine.cta_exit + self.machine.cta_start, cta.slot, cta.turn + 1)

    def _barrier(self, warp, where):
        return _found(warp.cta.barriers, warp.read(where) & 0xFFFFFFFF, "an mbarrier", "that nothing has initialized")

    def _box(self, warp, where):
        return _found(self.kernel.descriptors, warp.read(where), "a descriptor", "that is no argument of the kernel")


def _found(table, at, what, fault):
    if at not in table:
        raise CannotModel(f"{what} at {at:#x} {fault}")
    return table[at]
