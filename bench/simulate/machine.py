"""What is taken to be true of an H200 (for the published matmuls, of an H100): clocks, and bytes a clock.

Sources: [D] NVIDIA's data sheets and the CUDA programming guide; [M] of the order of published microbenchmarks
("Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", arXiv 2402.13499), rounded; [C]
calibrated on the published figures of plain matmuls (`matmul.PUBLISHED`); [A] assumed. Those of [M], [C] and [A] that
matter most are varied in `OPTIMISTIC` and `PESSIMISTIC`.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Machine:
    # the multiprocessor
    sms: int = 132  # [D]
    registers: int = 65536  # [D] of 32 bits; handed out to a warp in units of 8 a thread
    shared_bytes: int = 228 * 1024  # [D] each CTA takes 1 KB besides what it asks for
    threads: int = 2048  # [D]
    # tensor cores
    wgmma_issue: float = 8  # [A] from issue to the tensor core
    wgmma_depth: int = 2  # [A] products of a warp that may be queued or begun before it stalls
    wgmma_pipe: float = 32  # [M] from the last operand to sums that can be read
    wake: float = 14  # [A] of a warp that waits for a product
    shared_rate: float = 128  # [D] of shared memory: operands of wgmma and arrivals of TMA share it
    shared_backlog: float = 512  # [A] clocks of arrivals that wait before products do
    # synchronization
    barrier: float = 22  # [M] BAR.SYNC, from the last arrival
    trywait: float = 24  # [A] of an mbarrier that is ready
    # memory
    l2_rate: float = 48  # [C] loads of one SM while all of them load
    tma_gap: float = 20  # [A] between two boxes
    tma_latency: float = 750  # [M] of a box from L2, loaded
    late_latency: float = 900  # [A] of a box of the epilogue: residuals come from HBM
    store_rate: float = 24  # [A] of one SM through TMA
    store_latency: float = 450  # [A] until a store has read its shared memory
    partial_rate: float = 20  # [A] of pointer stores of fp32 sums
    hbm_gbps: float = 4300  # [A; D: 4800 at most] the floor's, and of the reading of partial sums
    # instructions of variable latency
    global_load: float = 500  # [M]
    shared_load: float = 30  # [M]
    shuffle: float = 24  # [M]
    special: float = 22  # [M] MUFU, and conversions between integers and floats
    constant: float = 30  # [M]
    system_register: float = 26  # [A]
    variable: float = 24  # [A] any other
    operand_read: float = 24  # [A] until an operand that is read late may be overwritten
    shared_issue: float = 4  # [D] a warp's access to shared memory at full width
    fetch: float = 0.5  # [A] for each instruction that a warp meets for the first time
    # launches
    cta_start: float = 700  # [A] until a CTA that takes another's place runs
    cta_exit: float = 150  # [A]
    kernel_us: float = 0.9  # [A] of a launch among others
    reduction_us: float = 2.0  # [A] of the launch that sums partial weight gradients, besides its bytes
    # the clock falls with the power that tensor cores draw [C]
    clock_most: float = 1.9  # GHz
    clock_least: float = 1.5
    tensor_tflops: float = 790  # [A; D: 989 at most] dense 16-bit products, for the floor
    tensor_flops_per_clock: int = 4096  # [D] of an SM

    def clock_at(self, tensor_share: float) -> float:
        """GHz while tensor cores are busy for that share of the time."""
        return max(self.clock_least, min(self.clock_most, self.clock_most - 0.76 * (tensor_share - 0.45)))


BASE = Machine()
OPTIMISTIC = replace(
    BASE, barrier=15, trywait=12, wgmma_pipe=16, wake=8, l2_rate=56, tma_latency=600, cta_start=450, fetch=0.0,
    operand_read=12, store_rate=32, store_latency=350, late_latency=700,
)  # fmt: skip
PESSIMISTIC = replace(
    BASE, barrier=30, trywait=32, wgmma_pipe=48, wake=24, l2_rate=42, tma_latency=950, cta_start=1000, fetch=1.0,
    operand_read=36, store_rate=20, store_latency=600, late_latency=1200, wgmma_depth=1,
)  # fmt: skip
