"""How long a call takes: alternatives take turns, and what is reported are the samples.

On a GPU three ways: eager calls back to back (the slower of host and device counts; `host_ms` is the host alone), a
CUDA graph with a warm L2 cache, and a CUDA graph whose cache was overwritten before each call. A graph of a short call
holds it several times, so that starting the graph is not what is timed. Random data, since clocks move with the data;
alternatives in random order, since they move with time too. On a CPU there are eager calls alone.
"""

import contextlib
import dataclasses
import gc
import random
import time
from collections.abc import Callable

import torch

GRAPH_MS = 0.4  # the least that one graph is to take
MOST_REPEATS = 20  # calls in one graph
MOST_QUEUED = 20  # eager calls in one sample: beyond about a thousand kernels the host waits for the device
COLD_SAMPLES = 3  # a round
FLUSH = 4  # times the size of the L2 cache


@dataclasses.dataclass(frozen=True)
class Settings:
    rounds: int = 15
    sample_ms: float = 2.0  # the least that a sample takes
    warmup: int = 3


@dataclasses.dataclass
class Timing:
    """Milliseconds of one call, as often as it was sampled; or why it was not."""

    graph: bool = False
    l2: str = "warm"
    samples: list[float] = dataclasses.field(default_factory=list)
    host: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None


class DeviceLost(RuntimeError):
    """The device answers no more: nothing after this can be measured in this process."""


def measure(calls: dict[str, Callable], device: torch.device, settings: Settings) -> dict[str, list[Timing]]:
    """Every way in which the device can be timed, of each of the alternatives `calls`.

    Each was called before, so that nothing compiles or tunes here. Raises DeviceLost.
    """
    found = {name: [] for name in calls}
    for way in WAYS[device.type]:
        for name, timing in way(calls, device, settings).items():
            found[name].append(timing)
        release(device)  # graphs hold memory
    return found


def measure_steady(calls: dict[str, Callable], device: torch.device, settings: Settings) -> dict[str, Timing]:
    """Of these ways the one without launches in it: CUDA graphs with a warm cache, eager calls on a CPU."""
    found = STEADY[device.type](calls, device, settings)
    release(device)
    return found


def measure_eager(calls: dict[str, Callable], device: torch.device, settings: Settings) -> dict[str, Timing]:
    """Of these ways eager calls."""
    found = WAYS[device.type][0](calls, device, settings)
    release(device)
    return found


def peak_mib(call: Callable, device: torch.device) -> float | None:
    """Memory that one call allocates at most beyond what there was before it; None on a CPU, which does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives freed memory back, so that the next alternative finds what the first one found."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_device(device: torch.device, error: BaseException) -> None:
    """Raises DeviceLost where the device is lost after `error` (an illegal access, say, ends a CUDA context)."""
    try:
        synchronize(device)
    except Exception as found:
        raise DeviceLost(f"{type(error).__name__}: {error}") from found


def _take_turns(calls, device, settings, sampler, **way):
    """A Timing of each call; sampler(call, timing) prepares a call, and returns what takes a sample of it."""
    timings, samplers = {}, {}
    for name, call in calls.items():
        timings[name] = Timing(**way)
        with _errors_into(timings[name], device):
            for _ in range(settings.warmup):
                call()
            synchronize(device)
            samplers[name] = sampler(call, timings[name])
    order = list(samplers)
    shuffle = random.Random(0).shuffle
    for _ in range(settings.rounds):
        shuffle(order)
        for name in order:
            if timings[name].error is None:
                with _errors_into(timings[name], device):
                    samplers[name]()
    return timings


@contextlib.contextmanager
def _errors_into(timing, device):
    try:
        yield
    except Exception as error:
        timing.error = f"{type(error).__name__}: {error}"
        timing.samples.clear()
        check_device(device, error)
        release(device)


def _cpu(calls, device, settings):
    def sampler(call, timing):
        count = _count(_seconds(call, 1) * 1e3, settings.sample_ms)
        return lambda: timing.samples.append(_seconds(call, count) / count * 1e3)

    return _take_turns(calls, device, settings, sampler)


def _seconds(call, count):
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _count(ms, least_ms, most=1000):
    return max(1, min(most, round(least_ms / max(ms, 1e-6))))


def _eager(calls, device, settings):
    def sampler(call, timing):
        count = _count(device_ms(call, 3), settings.sample_ms, MOST_QUEUED) if settings.sample_ms else 1

        def sample():
            start, end = _events()
            torch.cuda.synchronize()
            start.record()
            seconds = _seconds(call, count)
            end.record()
            end.synchronize()
            timing.samples.append(start.elapsed_time(end) / count)
            timing.host.append(seconds / count * 1e3)

        return sample

    return _take_turns(calls, device, settings, sampler)


def _graph_warm(calls, device, settings):
    capture = _capturer()

    def sampler(call, timing):
        repeats = _count(device_ms(capture(call).replay, 5), GRAPH_MS, MOST_REPEATS)
        graph = capture(call, repeats)
        replays = _count(device_ms(graph.replay, 3), settings.sample_ms)
        return lambda: timing.samples.append(device_ms(graph.replay, replays) / repeats)

    return _take_turns(calls, device, settings, sampler, graph=True)


def _graph_cold(calls, device, settings):
    capture = _capturer()
    size = FLUSH * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def sampler(call, timing):
        graph = capture(call)

        def sample():
            for _ in range(COLD_SAMPLES):
                start, end = _events()
                buffer.zero_()  # longer than the host needs to queue what follows
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                timing.samples.append(start.elapsed_time(end))

        return sample

    return _take_turns(calls, device, settings, sampler, graph=True, l2="cold")


WAYS = {"cpu": (_cpu,), "cuda": (_eager, _graph_warm, _graph_cold)}
STEADY = {"cpu": _cpu, "cuda": _graph_warm}


def _capturer():
    """capture(call, repeats) -> a CUDA graph of so many calls.

    The graphs share memory, as each alternative's own would not fit: they never run at the same time, and keep no
    outputs. All of them live as long as `capture` does: torch takes a pool whose graphs are gone for a mistake.
    """
    pool, graphs = torch.cuda.graph_pool_handle(), []

    def capture(call, repeats=1):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # torch asks for a warm-up on a stream of its own
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for _ in range(repeats):
                call()
        graphs.append(graph)
        return graph

    return capture


def device_ms(call, count):
    """Milliseconds of one of `count` calls that follow each other on the GPU."""
    start, end = _events()
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def _events():
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
