"""Where kernels run: on a GPU where one is, else in Triton's interpreter on CPU tensors.

That must be decided before triton is imported. TRITON_INTERPRET=1 in the environment chooses the interpreter on a
machine with a GPU too. With --emulated they run compiled, on an emulated GPU: tests marked gpu and those of
tests/machine, and no others.
"""

import os
import zlib

import pytest
import torch

from tests.support import emulation

# the tensors are tiny: more threads only wait for each other
torch.set_num_threads(1)
# oneDNN's gradient of a strided 1x1 writes past its workspace where channels_last images have few channels
# (uxlfoundation/oneDNN#6035): a test would crash at random, long after the one to blame
torch.backends.mkldnn.set_flags(False)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests marked long as well")
    emulated = "run the tests marked gpu on an emulated GPU, those of tests/machine, and no others"
    parser.addoption("--emulated", action="store_true", help=emulated)
    parser.addoption("--arch", type=int, default=90, help="with --emulated: 90 for sm_90, or 80")
    parser.addoption("--sample", type=int, default=1, metavar="N", help="with --emulated: one in N of those marked gpu")


def pytest_configure(config):
    if config.getoption("--emulated"):
        emulation.start(config.getoption("--arch"))
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def _interpreting():
    return os.environ.get("TRITON_INTERPRET") == "1"


def pytest_report_header(config):
    if config.getoption("--emulated"):
        return f"kernels run on an emulated sm_{emulation.driver.arch}, on this CPU: nothing is seen on a GPU"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):  # an -m in addopts would be lost as soon as a command has its own -m
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    emulated = config.getoption("--emulated")
    if emulated:
        runs = {item: _runs_emulated(item, config.getoption("--sample")) for item in items}
        config.hook.pytest_deselected(items=[item for item in items if not runs[item]])
        items[:] = [item for item in items if runs[item]]
    has_gpu = emulated or (torch.cuda.is_available() and not _interpreting())
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and TRITON_INTERPRET unset"))
        if emulated and (reason := item.get_closest_marker("real_gpu")):
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU, not an emulated one: {reason.args[0]}"))
        if item.get_closest_marker("machine") and not emulated:
            item.add_marker(pytest.mark.skip(reason="needs --emulated, as make test has it for its second part"))
        if item.get_closest_marker("interpreter") and not _interpreting():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: kernels run on the GPU here"))
        if _takes_a_modules_fixture(item) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))  # it is made once, in one process


def _runs_emulated(item, share):
    """Tests of the machine, and one in `share` of the GPU's, always the same ones."""
    if item.get_closest_marker("machine"):
        return True
    return item.get_closest_marker("gpu") is not None and zlib.crc32(item.nodeid.encode()) % share == 0


def _takes_a_modules_fixture(item):
    return any(definitions[-1].scope == "module" for definitions in item._fixtureinfo.name2fixturedefs.values())


PRECISION, BENCHMARK = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark


@pytest.fixture(autouse=True)
def torch_settings():
    """What a command told torch for its whole process, within a test or a module's fixture, no other test meets."""
    if torch.get_float32_matmul_precision() != PRECISION:
        torch.set_float32_matmul_precision(PRECISION)
    torch.backends.cudnn.benchmark = BENCHMARK


@pytest.fixture
def device():
    """The device that kernels run on here."""
    return torch.device("cpu") if _interpreting() else emulation.gpu()


@pytest.fixture
def poisoned(monkeypatch):
    """Every fresh allocation holds NaN (integers their least value): what a kernel forgets to write shows."""

    def poison(tensor):
        if tensor.is_meta:
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).min) if tensor.dtype != torch.bool else tensor.fill_(True)

    def poisoning(allocate):
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
        (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
