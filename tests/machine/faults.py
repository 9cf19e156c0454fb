"""Faults put into correct PTX: functions of it that return it changed, or None where the fault has no place in it."""

import re


def nth(pattern, replacement, which):
    """Replaces the which-th match."""

    def change(ptx):
        matches = list(re.finditer(pattern, ptx))
        if not -len(matches) <= which < len(matches):
            return None
        found = matches[which]
        return ptx[: found.start()] + found.expand(replacement) + ptx[found.end() :]

    return change


def in_loop(pattern, replacement):
    """Replaces all matches in the loop around the products."""

    def change(ptx):
        back = [
            m for m in re.finditer(r"bra(?:\.uni)?\s+(\$L__BB\d+_\d+);", ptx) if 0 <= ptx.find(f"\n{m[1]}:") < m.start()
        ]
        loops = [(ptx.find(f"\n{m[1]}:"), m.end()) for m in back]
        inner = [loop for loop in loops if re.search(r"wgmma\.mma_async|tcgen05\.mma", ptx[slice(*loop)])]
        if not inner:
            return None
        start, end = inner[0]
        return ptx[:start] + re.sub(pattern, replacement, ptx[start:end]) + ptx[end:]

    return change


def without_barrier_before_store(ptx):
    store = ptx.rfind("cp.async.bulk.tensor.4d.global")
    barrier = ptx.rfind("bar.sync", 0, store)
    return ptx[:barrier] + ptx[ptx.index(";", barrier) + 1 :] if barrier > 0 else None


def with_wait_behind(ptx):
    """The last wait for a TMA load ahead of the first product, moved to where that product is waited for."""
    product = ptx.index("wgmma.mma_async")
    waits = list(re.finditer(r"\{\s*\.reg \.pred\s+complete;.*?\n\s*\}", ptx[:product], re.DOTALL))
    if not waits:
        return None
    start, end = waits[-1].span()
    retired = ptx.index("wgmma.wait_group", product)
    return ptx[:start] + ptx[end:retired] + "\n" + ptx[start:end] + "\n" + ptx[retired:]


def with_slice_twice(ptx):
    """The second slice of k begins where the first does."""
    found = re.search(r"(add\.s64\s+%rd\d+, %rd\d+, )(-?\d{15,});", ptx)
    if found:
        return ptx[: found.start()] + f"{found[1]}{int(found[2]) - 2};" + ptx[found.end() :]
    # since Triton 3.9 each descriptor is put together by itself: those of A and B in turn
    descriptors = list(re.finditer(r"(or\.b64\s+%rd\d+, )(%rd\d+)(, -?\d{15,};)", ptx))
    if len(descriptors) < 3:
        return None
    first, second = descriptors[0], descriptors[2]
    return ptx[: second.start()] + second[1] + first[2] + second[3] + ptx[second.end() :]


def with_commit_ahead(ptx):
    """The loop's commit, moved ahead of the product before it."""
    commit = list(re.finditer(r"\n[^\n]*tcgen05\.commit[^\n]*", ptx))[-1]
    product = ptx.rindex("\n", 0, ptx.rindex("tcgen05.mma", 0, commit.start()))
    address = re.search(r"\[(%rd\d+)\]", commit[0])[1]
    written = re.search(rf"\n[^\n]*{address}, %r\d+;", ptx[: commit.start()])
    if written is None:
        return None
    return ptx[:product] + written[0] + commit[0] + ptx[product : commit.start()] + ptx[commit.end() :]


FORWARD, WEIGHT, STATISTICS = "_conv_fwd_kernel", "_conv_bwd_weight_kernel", "_bn_stats_fwd_kernel"
WAIT = r"wgmma\.wait_group\.sync\.aligned \d+;"
LANDED = r"@!complete bra\.uni waitLoop;"
# by architecture; name: (kernel, operation of `layer`, fault)
FAULTS = {}
FAULTS[90] = {
    "a product is not waited for": (FORWARD, "plain", nth(WAIT, "", -1)),
    "no product of the loop is waited for": (FORWARD, "plain", in_loop(WAIT, "wgmma.wait_group.sync.aligned 7;")),
    "a TMA load is not waited for": (FORWARD, "plain", nth(LANDED, "", 0)),
    "a later TMA load is not waited for": (FORWARD, "plain", nth(LANDED, "", 3)),
    "a product begins before its operand is waited for": (FORWARD, "plain", with_wait_behind),
    "too many bytes are expected": (
        FORWARD, "plain", nth(r"(expect_tx\.shared(?:::cta)?\.b64 _, \[%r\d+\], )\d+;", r"\g<1>8208;", 1),
    ),
    "no proxy fence before the TMA store": (FORWARD, "plain", nth(r"fence\.proxy\.async\.shared::cta;", "", -1)),
    "the TMA store is not waited for": (FORWARD, "plain", nth(r"cp\.async\.bulk\.wait_group(?:\.read)?\s+0;", "", -1)),
    "no barrier before the TMA store": (FORWARD, "plain", without_barrier_before_store),
    "no barrier frees a stage": (FORWARD, "plain", in_loop(r"bar\.sync\s+0;", "")),
    "a matrix descriptor has another swizzle": (
        FORWARD, "plain", nth(r"(or\.b64\s+%rd\d+, %rd\d+, )-?\d{15,};", r"\g<1>-9223371899415822336;", 0),
    ),
    "a slice of k is read twice": (FORWARD, "plain", with_slice_twice),
    "the phase never flips": (FORWARD, "plain", nth(r"xor\.b32(\s+%r\d+, %r\d+, %r\d+);", r"or.b32\1;", -1)),
    "a column is written where another belongs": (
        FORWARD, "plain", nth(r"(stmatrix[^;]*\{%r\d+), (%r\d+), (%r\d+), (%r\d+)\}", r"\1, \3, \2, \4}", 0),
    ),
    "a TMA box begins a pixel further": (
        FORWARD, "plain",
        nth(r"(cp\.async\.bulk\.tensor\.4d\.shared[^;]*\{%r\d+), (%r\d+), (%r\d+), (%r\d+)\}", r"\1, \3, \2, \4}", 0),
    ),
    "a sum over lanes skips a step": (
        STATISTICS, "norm", nth(r"shfl\.sync\.bfly\.b32(\s+%r\d+, %r\d+, )\d+,", r"shfl.sync.bfly.b32\g<1>0,", -1),
    ),
    "a sum over warps has no barrier": (STATISTICS, "norm", nth(r"bar\.sync\s+0;", "", 1)),
    "weight gradient: no product is waited for": (
        WEIGHT, "wgrad", lambda ptx: re.sub(WAIT, "wgmma.wait_group.sync.aligned 7;", ptx),
    ),
    "weight gradient: a TMA load is not waited for": (WEIGHT, "wgrad", nth(LANDED, "", 0)),
    "weight gradient: an operand is not transposed": (
        WEIGHT, "wgrad", nth(r"(wgmma\.mma_async[^;]*), 1, 1;", r"\1, 1, 0;", 0),
    ),
}  # fmt: skip
FAULTS[100] = {
    "the last products are not waited for": (FORWARD, "plain", nth(LANDED, "", -1)),
    "products of the loop are not waited for": (FORWARD, "plain", nth(LANDED, "", 2)),
    "a commit covers all but the last product": (FORWARD, "plain", with_commit_ahead),
    "zeros are not waited for": (FORWARD, "plain", nth(r"tcgen05\.wait::st\.sync\.aligned;", "", 0)),
    "sums are not waited for": (FORWARD, "plain", nth(r"tcgen05\.wait::ld\.sync\.aligned;", "", 0)),
    "tensor memory is not given back": (FORWARD, "plain", nth(r"@%p\d+ tcgen05\.dealloc[^;]*;", "", 0)),
    "too little tensor memory": (FORWARD, "plain", nth(r"(tcgen05\.(?:de)?alloc[^;]*), 128;", r"\1, 64;", 0)),
    "sums are read a column further": (FORWARD, "plain", nth(r"(tcgen05\.ld[^;]* \+) 0\]", r"\1 1]", 0)),
    "a product is of 32 columns only": (
        FORWARD, "plain", lambda ptx: re.sub(r"(mov\.b32\s+%r\d+, )69207184;", r"\g<1>67634320;", ptx),
    ),
    "sums are not added to": (FORWARD, "plain", nth(r"(tcgen05\.mma[^;]*), %p\d+;", r"\1, 0;", -1)),
    "a matrix descriptor has another swizzle": (
        FORWARD, "plain", nth(r"(or\.b64\s+%rd\d+, %rd\d+, )461\d{16};", r"\g<1>-9223301393232691200;", 0),
    ),
    "a TMA load is not waited for": (FORWARD, "plain", nth(LANDED, "", 0)),
    "weight gradient: products are not waited for": (WEIGHT, "wgrad", nth(LANDED, "", -1)),
    "weight gradient: an operand is not transposed": (
        WEIGHT, "wgrad", lambda ptx: re.sub(r"(mov\.b32\s+%r\d+, )67470480;", r"\g<1>67404944;", ptx),
    ),
}  # fmt: skip
