"""What a process holds: memory, open files, threads."""

import gc
import statistics
import threading
from pathlib import Path

import torch

WARM = 3  # rounds in which caches may fill
GROWTH_MIB = 64.0  # allocators do not give everything back


class Watch:
    """Asked once a round; AssertionError where the process holds more and more."""

    def __init__(self, device: torch.device):
        self.device, self.seen = device, []

    def check(self) -> dict:
        """What is held now."""
        gc.collect()
        now = held(self.device)
        self.seen.append(now)
        if len(self.seen) > WARM:
            first = self.seen[WARM - 1]
            assert now["files"] <= first["files"], f"{now['files']} open files, {first['files']} before"
            assert now["threads"] <= first["threads"], f"{now['threads']} threads, {first['threads']} before"
            assert now["cuda_bytes"] <= first["cuda_bytes"], f"{now} on the GPU, {first} before"
            # of several rounds: one of them may be large for a moment
            grown = statistics.median(row["mib"] for row in self.seen[-WARM:]) - first["mib"]
            assert grown < GROWTH_MIB, f"{grown:.0f} MiB more than after round {WARM}"
        return now


def held(device: torch.device) -> dict:
    """mib: resident memory. cuda_bytes: of live tensors, after all that was queued is done."""
    status = Path("/proc/self/status")
    resident = 0.0
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        resident = int(line.split()[1]) / 1024
    files = Path("/proc/self/fd")
    on_gpu = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        on_gpu = torch.cuda.memory_allocated(device)
    return {
        "mib": round(resident, 1),
        "files": len(list(files.iterdir())) if files.exists() else 0,
        "threads": threading.active_count(),
        "cuda_bytes": on_gpu,
    }
