"""Whether one warp group may overwrite what another one still multiplies: read off a kernel's PTX.

A wgmma reads its operands from shared memory while the program goes on, and `wgmma.wait_group` waits for those of its
own warp group only. A program of eight warps has two: where one of them has waited and goes on to write to shared
memory, the other may still read what is overwritten. Both have waited once they have met at a barrier. Triton takes
the wait itself for such a barrier (triton-lang/triton#11047), and leaves the barrier out where nothing else asks for
one.

So between a `wgmma.wait_group` and the next write to shared memory there must be a barrier of the whole program, on
every path through branches and loops. Writes are stores, copies into shared memory (cp.async, TMA), atomics and the
initialization of an mbarrier, whose memory may have been an operand's. Addresses are not compared: a write to memory
that no product reads counts too, and so does one that is ordered by an mbarrier, on which each group would arrive
after its wait; our kernels have no such handshake. A program of four warps is one warp group, and needs nothing.
"""

import re

WARP_GROUP = 128  # threads

_WAIT = re.compile(r"\bwgmma\.wait_group\b")
_BARRIER = re.compile(r"\b(bar|barrier(\.cta)?)\.(sync|red)\S*\s+0;|\bbarrier\.cluster\.wait\b")
# the first space that a copy names is where it writes
_WRITE = re.compile(
    r"\b((st|red|atom)\.(\w+\.)*shared|stmatrix\.|mbarrier\.init\."
    r"|cp\.(reduce\.)?async\.(bulk\.)?(tensor\.\dd\.|c[ag]\.)?shared)"
)
_LABEL = re.compile(r"([\w$]+):")
_BRANCH = re.compile(r"(@\S+\s+)?bra(\.uni)?\s+([\w$]+);")
_END = re.compile(r"(ret|exit|trap);")  # unconditional: a predicated one may go on


def unguarded_writes(ptx: str) -> list[str]:
    """The writes to shared memory that follow a wait for wgmma without a barrier between, as lines of the PTX.

    Always empty where the kernel has one warp group.
    """
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    if threads is None:
        raise ValueError("the PTX does not say how many threads a program has: no .reqntid and no .maxntid")
    if int(threads[1]) <= WARP_GROUP:
        return []
    lines = [line.partition("//")[0].strip() for line in ptx.splitlines()]
    labels: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        if label := _LABEL.fullmatch(line):
            labels.setdefault(label[1], []).append(number)
    found, seen = set(), set()
    # (line, whether a wait came after the last barrier)
    reached = [(0, False)]
    while reached:
        number, waited = reached.pop()
        if number == len(lines) or (number, waited) in seen:
            continue
        seen.add((number, waited))
        line = lines[number]
        if _WAIT.search(line):
            waited = True
        elif _BARRIER.search(line):
            waited = False
        elif waited and _WRITE.search(line):
            found.add(number)
        branch = _BRANCH.match(line)
        if branch:
            # inline assembly repeats labels, each in a scope: the nearest one is meant
            target = min(labels[branch[3]], key=lambda place: abs(place - number))
            reached.append((target, waited))
        if not (branch and branch[1] is None) and not _END.match(line):
            reached.append((number + 1, waited))
    return [lines[number] for number in sorted(found)]
