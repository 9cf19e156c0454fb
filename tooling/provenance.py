"""Where and with what a run was made: the device, the versions, the state of the checkout."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import rir_kernels as rir
from tooling.sources import sources_hash

ROOT = Path(__file__).resolve().parent.parent


def of_a_run(device: torch.device, kind: str = "models") -> dict:
    """All of it, by the names that it has in results; kind: of the figures, one of `sources.KINDS`."""
    commit, dirty = git_state()
    described = describe(device)
    return {
        "device": described,
        "versions": versions(),
        "git_commit": commit,
        "git_dirty": dirty,
        "sources_hash": sources_hash(kind, described),
    }


def git_state() -> tuple[str, bool]:
    """(commit, whether tracked files differ from it); ("unknown", False) outside a checkout."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if commit is None:
        return "unknown", False
    return commit, bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"))


def versions() -> dict[str, str]:
    """Of everything that has a say in a figure."""
    report = rir.env_report()
    found = {name: str(report[name]) for name in ("rir_kernels", "python", "torch", "triton", "numpy", "cuda", "cudnn")}
    return found | {"platform": report["platform"]}


def describe(device: torch.device) -> dict:
    """The device as it is now; what the driver tells is left out where nvidia-smi is not there."""
    if device.type != "cuda":
        return {
            "name": _cpu_name(),
            "type": "cpu",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "type": "cuda",
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size / 2**20,
        **driver_state(device),
    }


def driver_state(device: torch.device) -> dict:
    """Driver, clocks, temperature and power, as nvidia-smi tells them now; empty where it does not."""
    fields = {
        "driver": "driver_version",
        "sm_clock_mhz": "clocks.sm",
        "sm_clock_max_mhz": "clocks.max.sm",
        "memory_clock_mhz": "clocks.mem",
        "temperature_c": "temperature.gpu",
        "power_w": "power.draw",
        "power_limit_w": "power.limit",
    }
    if device.type != "cuda":
        return {}
    uuid = str(torch.cuda.get_device_properties(device).uuid)  # its index need not be torch's
    selector = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    query = f"--query-gpu={','.join(fields.values())}"
    line = _output("nvidia-smi", f"--id={selector}", query, "--format=csv,noheader,nounits")
    values = [value.strip() for value in line.split(",")] if line else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _output(*command):
    """What the command prints, or None where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
