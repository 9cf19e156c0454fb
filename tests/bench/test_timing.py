"""Alternatives take turns, a fault of one is its own, and samples are milliseconds of one call."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from bench.measure import timing
from bench.measure.ceilings import measure_ceilings
from bench.measure.runner import quartiles

CPU = torch.device("cpu")
FEW = timing.Settings(rounds=4, sample_ms=0.0, warmup=1)


def test_samples_are_milliseconds_of_one_call():
    settings = timing.Settings(rounds=3, sample_ms=30.0, warmup=1)
    (found,) = timing.measure({"nap": lambda: time.sleep(0.005)}, CPU, settings)["nap"]
    assert (found.graph, found.l2, found.error) == (False, "warm", None)
    assert len(found.samples) == 3
    # a sleep may be late, by a busy machine's scheduler, and is never early
    assert all(5.0 <= sample < 50.0 for sample in found.samples)


def test_alternatives_take_turns():
    calls = []
    timing.measure({name: lambda name=name: calls.append(name) for name in "abc"}, CPU, FEW)
    # a warm-up and a trial each; then rounds of one sample each, of one call, in changing order
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = [calls[i : i + 3] for i in range(6, len(calls), 3)]
    assert len(rounds) == FEW.rounds
    assert all(sorted(taken) == ["a", "b", "c"] for taken in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_a_fault_is_its_own():
    left = iter(range(3))  # good for warm-up, trial and one sample

    def failing():
        next(left)

    found = timing.measure({"fails": failing, "works": lambda: None}, CPU, FEW)
    (fails,), (works,) = found["fails"], found["works"]
    assert fails.error.startswith("StopIteration")
    assert fails.samples == []  # half of the samples would be another experiment
    assert works.error is None and len(works.samples) == FEW.rounds


def test_a_lost_device_ends_it(monkeypatch):
    def failing():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(timing, "synchronize", lambda device: failing())
    with pytest.raises(timing.DeviceLost, match="illegal memory access"):
        timing.measure({"fails": failing}, CPU, FEW)


def test_quartiles():
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_ceilings_are_bytes_and_operations(monkeypatch):
    # one copy reads and writes 2 bytes an element; a product of n x n matrices is 2 n^3 operations
    monkeypatch.setattr("bench.measure.ceilings.SIZES", {"cpu": (1000, 100, 10)})
    monkeypatch.setattr("bench.measure.ceilings._milliseconds", lambda *args: 2.0)
    assert measure_ceilings(CPU, ("fp32",), FEW) == {
        "copy_gbps": 4 * 1000 / 2e-3 / 1e9,
        "l2_gbps": 4 * 100 / 2e-3 / 1e9,
        "matmul_tflops": {"fp32": 2 * 10**3 / 2e-3 / 1e12},
    }


class FakeGPU:
    """Stands in for torch.cuda: a clock in milliseconds, which work moves on, and graphs that remember work."""

    def __init__(self, monkeypatch):
        self.now, self.recording, self.replays, self.pools = 0.0, None, [], []
        for name, stand_in in {
            "Event": lambda enable_timing: FakeEvent(self),
            "Stream": FakeStream,
            "current_stream": FakeStream,
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda *_: None,
            "CUDAGraph": lambda: FakeGraph(self),
            "graph": self.capture,
            "graph_pool_handle": lambda: self.pools.append(len(self.pools)) or self.pools[-1],
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1024),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def work(self, ms):
        if self.recording is None:
            self.now += ms
        else:
            self.recording.append(ms)

    @contextlib.contextmanager
    def capture(self, graph, pool):
        assert pool == self.pools[-1]
        self.recording = graph.work
        yield
        self.recording = None


class FakeGraph:
    def __init__(self, gpu):
        self.gpu, self.work = gpu, []

    def replay(self):
        self.gpu.replays.append(len(self.work))
        self.gpu.now += LAUNCH + sum(self.work)


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


class FakeStream:
    def wait_stream(self, other):
        pass


LAUNCH = 0.004  # of a graph


def test_a_graph_of_a_short_call_holds_it_several_times(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    calls = {"short": lambda: gpu.work(0.016), "long": lambda: gpu.work(3.0)}
    found = timing._graph_warm(calls, CPU, timing.Settings(rounds=2, sample_ms=2.0))
    assert all(t.graph and t.l2 == "warm" and t.error is None and len(t.samples) == 2 for t in found.values())
    # 0.4 ms of calls of 0.02 ms with their launch: 20 in a graph, which share one launch
    assert found["short"].samples == pytest.approx([0.016 + LAUNCH / 20] * 2)
    assert found["long"].samples == pytest.approx([3.0 + LAUNCH] * 2)
    assert set(gpu.replays) == {1, 20}


def test_a_cold_sample_is_one_call_after_a_flush(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    flushed = []
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: flushed.append(self.numel()) or gpu.work(0.5))
    found = timing._graph_cold({"a": lambda: gpu.work(0.03)}, CPU, timing.Settings(rounds=4))["a"]
    assert (found.graph, found.l2) == (True, "cold")
    assert found.samples == pytest.approx([0.03 + LAUNCH] * 4 * timing.COLD_SAMPLES)
    assert flushed == [timing.FLUSH * 1024] * len(found.samples)
    assert gpu.replays == [1] * len(found.samples)


def test_eager_calls_follow_each_other(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    found = timing._eager({"a": lambda: gpu.work(0.25)}, CPU, timing.Settings(rounds=3, sample_ms=2.0))["a"]
    assert (found.graph, found.l2) == (False, "warm")
    assert found.samples == pytest.approx([0.25] * 3)
    assert len(found.host) == 3 and min(found.host) > 0


def test_a_failed_capture_is_a_row_with_its_error(monkeypatch):
    gpu = FakeGPU(monkeypatch)

    def syncing():
        if gpu.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    found = timing._graph_warm({"a": syncing, "b": lambda: gpu.work(1.0)}, CPU, FEW)
    assert found["a"].error == "RuntimeError: operation not permitted when stream is capturing"
    assert found["a"].samples == [] and len(found["b"].samples) == FEW.rounds


@pytest.mark.gpu
@pytest.mark.real_gpu("time, and CUDA graphs")
def test_a_graph_is_timed_three_ways():
    device = torch.device("cuda")
    x, y = (torch.randn(2**26, device=device) for _ in range(2))
    found = timing.measure({"copy": lambda: y.copy_(x), "add": lambda: torch.add(x, 1.0, out=y)}, device, FEW)
    for name in ("copy", "add"):
        assert [(t.graph, t.l2, t.error) for t in found[name]] == [
            (False, "warm", None), (True, "warm", None), (True, "cold", None)
        ]  # fmt: skip
        eager, warm, cold = (sorted(t.samples)[len(t.samples) // 2] for t in found[name])
        # half a gigabyte fits no cache and hides every launch: the three are the same within the noise of a busy GPU
        assert 0.5 < eager / warm < 2 and 0.5 < cold / warm < 2
