"""Two runs: what counts as slower, what as lost, and what as neither."""

import math

import pytest

from bench.report.compare import compare, parse_limit
from tests.bench.helpers import CPU, results, row


def against(before, after, limit=0.05, **changes):
    return compare(results(before), results(after, **changes), limit)


@pytest.mark.parametrize("ratio, slower, faster", [(1.06, 1, 0), (1.04, 0, 0), (0.9, 0, 1), (0.97, 0, 0)])
def test_the_limit_both_ways(ratio, slower, faster):
    comparison = against([row(ms_median=0.2)], [row(ms_median=0.2 * ratio)])
    assert (len(comparison.slower), len(comparison.faster)) == (slower, faster)
    assert comparison.failed == bool(slower)
    assert comparison.changes[0].ratio == pytest.approx(ratio)


def test_quartile_ranges_that_overlap_are_noise():
    before, after = row(ms_median=0.1, ms_q3=0.115), row(ms_median=0.12, ms_q1=0.114)
    comparison = against([before], [after])
    assert not comparison.failed
    assert "unclear" in str(comparison)
    assert "0.1000 [0.0990, 0.1150] -> 0.1200 [0.1140, 0.1212] ms, x1.200, within noise" in str(comparison)
    assert against([before], [row(ms_median=0.12, ms_q1=0.116)]).failed


def test_without_quartiles_the_medians_decide():
    before, after = (row(ms_median=ms, ms_q1=None, ms_q3=math.nan) for ms in (0.1, 0.2))
    assert against([before], [after]).failed


def test_lost_rows_fail():
    before = [row(), row(impl="triton"), row(impl="hybrid")]
    after = [row(passed=False, error="wrong"), row(impl="hybrid", ms_median=None, error="out of memory")]
    comparison = against(before, after)
    assert comparison.failed
    assert [(r.impl, why) for r, why in comparison.lost] == [
        ("auto", "wrong"), ("triton", "no such row any more"), ("hybrid", "out of memory"),
    ]  # fmt: skip
    assert not against(after, before).lost  # what had no time cannot lose it
    assert len(against(after, before).new) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"unreached": ["rir_layer 96@32 x256 bf16"]},  # as bench writes a case
        {"unreached": ["resnet18 224 x1 bf16", "rir_layer 96@32 x256 bf16"]},
        {"absent": {"cudnn": "no cuDNN"}},
    ],
)
def test_what_was_not_measured_does_not_fail(changes):
    comparison = against([row(impl="cudnn")], [row(shape="64@8")], **changes)
    assert [r.impl for r, _ in comparison.unmeasured] == ["cudnn"]
    assert not comparison.failed
    assert "not measured: layers rir_layer 96@32 x256" in str(comparison)


@pytest.mark.parametrize("unreached", ["rir_layer 96@32 x32 bf16", "rir_layer 64@8 x256 bf16", ""])
def test_another_case_that_was_not_reached_is_no_excuse(unreached):
    assert against([row()], [row(shape="64@8")], unreached=[unreached]).failed


def test_ours_is_never_absent():
    assert against([row(impl="triton")], [row(impl="auto")], absent={"triton": "gone"}).failed


def test_a_suite_that_was_not_run():
    comparison = against([row(), row(suite="models", op="resnet18")], [row()])
    assert [why for _, why in comparison.unmeasured] == ["its suite was not run"]
    assert not comparison.failed


def test_shapes_with_a_stride_are_matched_too():
    shape = "96-192@32 /2"
    unreached = [f"rir_layer {shape} x256 bf16"]
    assert not against([row(shape=shape)], [row()], unreached=unreached).failed


def test_means_are_by_suite_op_mode_and_impl():
    shapes = {"96@32": 1.5, "64@8": 0.9}
    before = [row(shape=shape) for shape in shapes] + [row(impl="triton")]
    after = [row(shape=shape, ms_median=0.1 * ratio) for shape, ratio in shapes.items()] + [row(impl="triton")]
    means = against(before, after).means()
    assert means["layers", "rir_layer", "step", "auto"] == (pytest.approx(math.sqrt(1.5 * 0.9)), 2)
    assert means["layers", "rir_layer", "step", "triton"] == (pytest.approx(1), 1)


def test_rows_of_other_timings_are_not_matched():
    comparison = against([row(), row(l2="cold", ms_median=0.2)], [row(l2="cold", ms_median=0.2), row(graph=False)])
    assert [change.ratio for change in comparison.changes] == [pytest.approx(1)]
    assert [r.graph for r, _ in comparison.lost] == [True]
    assert [r.graph for r in comparison.new] == [False]


def test_two_devices_are_refused():
    with pytest.raises(ValueError, match=r"Made-up GPU.*Made-up CPU.*two machines"):
        compare(results(), results(device=CPU), 0.05)


def test_versions_that_differ_are_said():
    assert "versions differ: torch was 9.8, is 9.9" in str(against([], [], versions={"python": "3.11", "torch": "9.9"}))


@pytest.mark.parametrize("text, limit", [("5%", 0.05), ("0.05", 0.05), (" 2.5 % ", 0.025), ("0", 0.0), (".1", 0.1)])
def test_limits(text, limit):
    assert parse_limit(text) == pytest.approx(limit)


@pytest.mark.parametrize("text", ["", "five", "-5%", "nan", "5%%", "1e-2x"])
def test_limits_that_are_none(text):
    with pytest.raises(ValueError, match=r"expected a limit such as 5%"):
        parse_limit(text)
