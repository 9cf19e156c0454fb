"""The kernels suite under pytest-benchmark: `pytest bench --benchmark-only`.

On a GPU the eleven rows in bf16, every call synchronised. Elsewhere small shapes of what a CPU has: its figures compare
PyTorch's operators with each other and say nothing of the Triton kernels. For figures to quote, `python -m bench`.
"""

import pytest
import torch

from bench import peers
from bench.cases import kernels
from bench.cases.selection import Selection
from bench.measure.timing import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SELECTION = (
    Selection(device_type="cuda", dtypes=("bf16",))
    if DEVICE.type == "cuda"
    else Selection(device_type="cpu", shapes=("16@32", "64@8"))
)
CASES = [
    pytest.param(case, impl, id=f"{DEVICE.type}-{case.op}-{case.shape}-{impl}".replace(" ", "-"))
    for case in kernels.cases(SELECTION)
    for impl in case.impls
    if peers.absent(impl, DEVICE) is None
]


@pytest.mark.parametrize(("case", "impl"), CASES)
def test_kernel(benchmark, case, impl):
    peers.compiled.forget()
    variant = case.set_up(DEVICE)(impl, True)
    verdict = variant.check()
    assert verdict.passed, verdict.error
    ((mode, call),) = variant.calls.items()
    benchmark.extra_info |= {"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "a CPU", "mode": mode}
    benchmark.group = f"{case} on {benchmark.extra_info['device']}"

    def synchronised():
        call()
        synchronize(DEVICE)

    benchmark.pedantic(synchronised, warmup_rounds=3, rounds=30, iterations=1)
