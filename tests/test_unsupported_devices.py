"""GPUs that the kernels are not written for: "auto" does without them, once with a warning; a name that was asked for
raises.
"""

import warnings

import pytest
import torch

from rir_kernels import dispatch
from rir_kernels.spec import ConvBNActSpec

SPEC = ConvBNActSpec(padding=(1, 1))


class _On:
    """What `resolve` reads of a tensor on that device."""

    dtype = torch.float16
    shape = (2, 8, 4, 4)

    def __init__(self, device):
        self.device = torch.device(device)


WEIGHT = torch.empty(8, 8, 3, 3)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    dispatch._find_missing_on.cache_clear()
    yield
    dispatch._find_missing_on.cache_clear()


def _old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Made-up GPU 7")


def _rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.3")


UNSUPPORTED = {
    "capability 7.5": ("cuda:0", _old, r"compute capability 8\.0 or later, Made-up GPU 7 \(cuda:0\) has 7\.5"),
    "ROCm": ("cuda:0", _rocm, "ROCm"),
    "XPU": ("xpu:0", None, "xpu:0"),
    "MPS": ("mps:0", None, "mps:0"),
}


@pytest.mark.parametrize(("device", "make", "words"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_an_unsupported_gpu(monkeypatch, device, make, words):
    if make:
        make(monkeypatch)
    x = _On(device)
    with pytest.warns(RuntimeWarning, match=words) as warned:
        assert {dispatch.resolve("auto", x, WEIGHT, SPEC) for _ in range(3)} == {"torch"}
    assert len(warned) == 1
    for impl in ("hybrid", "triton"):
        with pytest.raises(RuntimeError, match=f'impl="{impl}".*{words}'):
            dispatch.resolve(impl, x, WEIGHT, SPEC)
    assert dispatch.resolve("torch", x, WEIGHT, SPEC) == "torch"


def test_a_cpu_needs_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.resolve("auto", _On("cpu"), WEIGHT, SPEC) == "torch"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_every_gpu_since_ampere_takes_the_kernels(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Made-up GPU 8")
    dispatch._device_name.cache_clear()
    try:
        assert dispatch.resolve("auto", _On("cuda:0"), WEIGHT, SPEC) == "triton"
    finally:
        dispatch._device_name.cache_clear()
