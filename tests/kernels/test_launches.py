"""The launch path below the kernels: Triton's own launcher, against a CUDA driver that writes launches down."""

import pytest
import torch

from rir_kernels.triton.kernels.weight_packing import _pack_weight_kernel
from rir_kernels.triton.launch import runtime
from rir_kernels.triton.launch.packing import pack_weight
from tests.support.simulated_helpers import needs_compiler, simulated

from .targets import TARGETS, ieee_fp32, rand  # noqa: F401 (an autouse fixture)


@pytest.fixture(scope="module")
def launches():
    return simulated("launches.py")


@pytest.fixture(scope="module")
def launches_before_hopper():
    return simulated("launches.py", SIMULATED_ARCH="80", RIR_KERNELS_OVERLAP="1")


@needs_compiler
def test_gpus_without_descriptors_get_none(launches_before_hopper):
    """Nor launches that overlap, though they are asked for; and replayed plans launch the same."""
    made = [launch for found in launches_before_hopper.values() for launch in found["long"]]
    assert {launch[5] for launch in made} == {0}
    assert not any(isinstance(argument, list) for launch in made for argument in launch[-1])
    test_a_replayed_plan_launches_what_the_regular_path_does(launches_before_hopper)


@needs_compiler
def test_a_replayed_plan_launches_what_the_regular_path_does(launches):
    """Same kernels, grids, tensor maps and arguments; but a replayed plan also updates the running statistics."""
    assert len(launches) >= 10
    for case, found in launches.items():
        assert found["planned"] == 1, case
        assert found["first"] == found["second"], case
        for short, long in zip(found["first"], found["long"], strict=True):
            if short[0] == "_bn_finalize_fwd_kernel":
                *tiles, eps, momentum = short[-1]
                assert tiles[6:9] == ["bn.running_mean+0", "bn.running_var+0", "bn.num_batches_tracked+0"], case
                assert momentum == pytest.approx(0.1)
                del tiles[6:9]
                assert [*tiles, eps] == long[-1][:-1], case
            else:
                assert short == long, case


@needs_compiler
def test_a_norm_alone_reads_x_where_it_is(launches):
    """Two passes and a merge, then the same again: x is the z of every one, and no image is copied."""
    made = launches["norm alone"]["second"]
    stats, _, apply, reduce, _, gradient = (arguments for *_, arguments in made)
    names = ("stats_fwd", "finalize_fwd", "apply_fwd", "reduce_bwd", "sum_bwd", "apply_bwd")
    assert [launch[0] for launch in made] == [f"_bn_{name}_kernel" for name in names]
    assert stats[0] == apply[0] == reduce[1] == gradient[1] == "x+0"
    assert reduce[0] == gradient[0] == "dy+0"


@needs_compiler
def test_addresses_that_come_again_are_not_encoded_again(launches):
    """But for what torch's own operators make first, which lies where they put it."""
    elsewhere = ("contiguous image", "projection")
    encoded = {case: found["encoded"] for case, found in launches.items() if case not in elsewhere}
    assert encoded == dict.fromkeys(encoded, 0)


@needs_compiler
def test_launches_overlap_where_that_is_asked_for(launches):
    """All of a layer's, by both ways: then each kernel waits by itself (what the compile gate checks)."""
    for asked, cases in ((0, launches), (1, simulated("launches.py", RIR_KERNELS_OVERLAP="1"))):
        made = [launch for found in cases.values() for way in ("long", "first", "second") for launch in found[way]]
        assert len(made) > 80 and {launch[5] for launch in made} == {asked}


@pytest.mark.parametrize("said, option", [(None, {"enable_fp_fusion": True}), ("0", {}), ("1", {})])
def test_products_and_sums_are_fused_unless_the_environment_says(monkeypatch, said, option):
    """Triton's default changes in 3.10; its own switch stays the user's."""
    if said is None:
        monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    else:
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", said)
    seen = []
    with runtime.intercepted(lambda kernel, programs, **options: seen.append(options)):
        runtime.launch(_pack_weight_kernel, 1, num_warps=4)
    (options,) = seen
    assert options == {"num_warps": 4, "USE_PDL": options["USE_PDL"]} | option


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", [(8, 8, 3, 3), (9, 5, 3, 3), (4, 6, 1, 1), (3, 16, 1, 3)], ids=str)
def test_packed_weight(target, shape, channels_last):
    weight = rand(shape, target, seed=1, channels_last=channels_last)
    for transposed, order in ((False, (2, 3, 0, 1)), (True, (2, 3, 1, 0))):
        packed = pack_weight(weight, transposed)
        assert torch.equal(packed, weight.permute(order).flatten(0, 1))
        assert packed.stride(1) * packed.element_size() % 16 == 0 and packed.data_ptr() % 16 == 0


@pytest.mark.parametrize("target", TARGETS[:1])
def test_rounding_to_tf32(target):
    """To nearest in 10 bits of mantissa, ties away from zero; infinities and NaN as they are."""
    exact, half = 2.0**-10, 2.0**-11
    values = [
        1.0,
        1 + exact,
        1 + half,
        1 + half * 0.999,
        -(1 + half),
        0.0,
        float("inf"),
        float("-inf"),
        torch.finfo().max,
    ]
    expected = [1.0, 1 + exact, 1 + exact, 1.0, -(1 + exact), 0.0, float("inf"), float("-inf"), float("inf")]
    weight, out = torch.tensor([*values, float("nan")]), torch.empty(10)
    weight[-1:].view(torch.int32).fill_(0x7FFFFFFF)  # whose bits would carry into the sign
    _pack_weight_kernel[(1,)](weight, out, 10, 1, 10, 10, 10, 1, 0, 0, KERNEL_W=1, TF32=True, BLOCK=16, USE_PDL=False)
    assert out[:-1].tolist() == expected and out[-1].isnan()
