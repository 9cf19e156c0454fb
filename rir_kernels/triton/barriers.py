"""Checks a kernel's PTX for a race: one warp group may overwrite an operand that another one still reads.

A wgmma reads its operands from shared memory asynchronously, and `wgmma.wait_group` waits only for those of its own
warp group. A program of eight warps has two warp groups: if one has waited and goes on to write to shared memory, the
other may still read what is overwritten. Only after a barrier have both waited. Triton treats the wait itself as such
a barrier (triton-lang/triton#11047), and omits the barrier if nothing else requires one.

So on every path through branches and loops, a barrier of the whole program must stand between a `wgmma.wait_group` and
the next write to shared memory. Writes are stores, copies into shared memory (cp.async, TMA), atomics and the
initialization of an mbarrier, whose memory may have been an operand's. The check does not compare addresses: it also
counts writes to memory that no product reads, and writes ordered by an mbarrier on which each group arrives after its
wait; our kernels have no such handshake. A program of four warps is one warp group and needs no barrier.
"""

import re

WARP_GROUP = 128  # threads

_WAIT = re.compile(r"\bwgmma\.wait_group\b")
_BARRIER = re.compile(r"\b(bar|barrier(\.cta)?)\.(sync|red)\S*\s+0;|\bbarrier\.cluster\.wait\b")
# a copy names its destination space first
_WRITE = re.compile(
    r"\b((st|red|atom)\.(\w+\.)*shared|stmatrix\.|mbarrier\.init\."
    r"|cp\.(reduce\.)?async\.(bulk\.)?(tensor\.\dd\.|c[ag]\.)?shared)"
)
_LABEL = re.compile(r"([\w$]+):")
_BRANCH = re.compile(r"(@\S+\s+)?bra(\.uni)?\s+([\w$]+);")
_END = re.compile(r"(ret|exit|trap);")  # unconditional: a predicated one may fall through


def unguarded_writes(ptx: str) -> list[str]:
    """Returns the PTX lines that write to shared memory after a wait for wgmma with no barrier between.

    Always empty if the kernel has one warp group.
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
            # inline assembly repeats labels in separate scopes: take the nearest one
            target = min(labels[branch[3]], key=lambda place: abs(place - number))
            reached.append((target, waited))
        if not (branch and branch[1] is None) and not _END.match(line):
            reached.append((number + 1, waited))
    return [lines[number] for number in sorted(found)]
