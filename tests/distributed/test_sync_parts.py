"""A batch in parts on ranks gives what nn.BatchNorm2d gives for it in one process.

Both sides run the same formula in fp64 where nothing else is said; they differ by rounding, in the order of a few
hundred summands. fp32 is compared with fp64 on the same numbers: 1e-4 leaves a few hundred roundings of 6e-8.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

import rir_kernels as rir
from rir_kernels import reference
from rir_kernels.common import switches
from tests.support.ranks import (
    assert_same,
    counted_gathers,
    norms,
    one_step,
    part,
    run_on_ranks,
    settled,
    whole_of,
)

pytestmark = pytest.mark.xdist_group("distributed")  # processes of their own: not in two workers at once
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}
BATCH, SIZE = 5, (5, 4)
PARTS = {2: ([1, 4], [5, 0]), 4: ([2, 0, 1, 2],)}  # uneven, and with ranks that have nothing


class Chain(nn.Module):
    """The second layer's input is the first's output alone: its data gradient brings the sums of the first's norm."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(rir.RiRLayer(4, 8, stride=2), rir.RiRLayer(8, 6))

    def forward(self, x):
        return self.layers(x.contiguous(memory_format=torch.channels_last))


def _fused(model):
    assert rir.fuse_(model).replaced
    return model


def _impl(impl, make):
    def model():
        made = make()
        for m in made.modules():
            if hasattr(m, "impl"):
                m.impl = impl
        return made

    return model


def _conv():
    return rir.ConvBNAct(4, 6, 3, bias=True, branch_scale=0.5)


def _sequential():
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())


# name: (model, channels of the inputs)
CASES = {
    "RiRLayer": (lambda: rir.RiRLayer(4, 6, stride=2), (4,)),
    "RiRBlock, projections": (lambda: rir.RiRBlock(4, 6, stride=2, shortcut="projection"), (4,)),
    "ConvBNAct, residual after the norm": (_conv, (4, 6)),
    "fused Sequential": (lambda: _fused(_sequential()), (4,)),
    "fused reference RiRLayer": (lambda: _fused(reference.RiRLayer(4, 6)), (4,)),
    "reference RiRLayer": (lambda: reference.RiRLayer(4, 6), (4,)),
    "impl reference": (_impl("reference", _conv), (4, 6)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (4,)),
    "BatchNorm2d, cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), (4,)),
    "BatchNorm2d, no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (4,)),
    "BatchNorm2d, not affine": (lambda: nn.BatchNorm2d(4, affine=False), (4,)),
}
# kernels run in the interpreter, which is slow
CASES |= {
    "triton, a chain": (_impl("triton", Chain), (4,)),
    "triton, ConvBNAct": (_impl("triton", _conv), (4, 6)),
    "hybrid, ConvBNAct": (_impl("hybrid", _conv), (4, 6)),
}


def _dtype(case):
    return torch.float32 if case.startswith(("triton", "hybrid")) else torch.float64


LONG = "triton, a chain", *(case for case in CASES if _dtype(case) == torch.float64 and case != "RiRLayer")
RUNS = [(2, tuple(CASES)), (4, ("RiRLayer",)), (4, LONG)]  # (ranks, cases): processes are started once for each


def _data(case, dtype):
    """(inputs, weights of the loss) of the whole batch."""
    generator = torch.Generator().manual_seed(2)
    make, channels = CASES[case]

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).float().to(dtype)

    inputs = [randn(BATCH, c, *SIZE) for c in channels]
    with torch.no_grad():
        out = settled(_impl("torch", make)())(*[x.double() for x in inputs])
    return inputs, randn(*out.shape)


def _steps(cases, device):
    """{(case, its parts): the results of one step}, and how often it gathered."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {}
    for case in cases:
        for index, sizes in enumerate(PARTS[world]):
            dtype = _dtype(case)
            model = rir.convert_sync_batchnorm(settled(CASES[case][0](), dtype, device))
            inputs, weights = _data(case, dtype)
            mine = [part(t, sizes, rank).to(device) for t in (*inputs, weights)]
            with counted_gathers() as gathers:
                results[case, index] = one_step(model, mine[:-1], mine[-1]), gathers[0]
    return results


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What each rank got in one of the runs."""

    @functools.cache
    def on(world, cases):
        folder = tmp_path_factory.mktemp("ranks") / str(world)
        return run_on_ranks(world, _steps, cases, "cpu", folder=folder)

    return on


@pytest.mark.parametrize(
    ("case", "run"),
    [
        pytest.param(case, run, marks=[pytest.mark.long] * (run[1] is LONG), id=f"{case}-{run[0]}")
        for run in RUNS
        for case in run[1]
    ],
)
def test_parts_of_a_batch_are_the_whole(steps, case, run):
    if _dtype(case) == torch.float32 and torch.cuda.is_available() and not switches.interpreting():
        pytest.skip("kernels run on the GPU here: see test_on_gpus")
    _assert_parts_are_the_whole(case, steps(*run))


def _assert_parts_are_the_whole(case, ranks):
    expected = _in_one_process(case)
    operations = len(norms(CASES[case][0]())) - (case == "fused reference RiRLayer")  # whose two norms run as one
    for index in range(len(PARTS[len(ranks)])):
        results = [rank[case, index] for rank in ranks]
        assert_same(whole_of([result for result, _ in results]), expected, **CLOSE[_dtype(case)])
        # one gather forward and one backward
        assert {gathers for _, gathers in results} == {2 * operations}


def _in_one_process(case):
    inputs, weights = _data(case, torch.float64)
    return one_step(settled(_impl("torch", CASES[case][0])()), inputs, weights)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_gpus(tmp_path):
    ranks = run_on_ranks(2, _steps, list(CASES), "cuda", folder=tmp_path / "ranks", device="cuda")
    for case in CASES:
        _assert_parts_are_the_whole(case, ranks)
