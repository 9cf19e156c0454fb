"""The report: its figures are the rows', none is dropped, and nothing that is missing stops it."""

import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from bench import report
from bench.report import plots, tables
from bench.report.speedup import cases
from tests.bench.helpers import CPU, KERNELS, everything, results, row


def pair(ours, theirs, **same):
    return [row(impl="auto", ms_median=ours, **same), row(impl="merged", ms_median=theirs, **same)]


def written(*args, **changes):
    """The Markdown of these rows."""
    return report.markdown(report.build([results(*args, **changes)]))


def cells(text, *starts):
    """The first line of a table that begins with these cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return next(line for line in lines if line[: len(starts)] == list(starts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report.write([made()], folder)
    return folder


def made():
    made = everything()
    made.rows[:] = [row for row in made.rows if row.op != "basic_block"]  # it is drawn as a RiRLayer is
    return made


def test_speedups_and_their_mean():
    text = written([*pair(0.1, 0.3), *pair(0.2, 0.25, shape="64@8")])
    assert cells(text, "96@32", "256", "auto") == ["96@32", "256", "auto", "3.00"]
    assert cells(text, "64@8", "256", "auto") == ["64@8", "256", "auto", "1.25"]
    mean = f"{math.sqrt(3 * 1.25):.2f} of 2"
    assert cells(text, "geometric mean")[3] == f"**{mean}**"
    assert cells(text, "layers", "rir_layer", "bf16", "step")[4] == mean


def test_the_best_of_a_row_is_bold_and_has_its_spread():
    text = written([row(impl="auto", ms_q1=0.098, ms_q3=0.104), row(impl="merged", ms_median=0.3)])
    assert cells(text, "96@32", "256") == ["96@32", "256", "0.300 ±1%", "**0.100 ±3%**"]


def test_graphs_are_not_set_against_eager_calls():
    rows = [row(impl="auto", ms_median=0.1), row(impl="merged", ms_median=0.3, graph=False)]
    (case,) = cases(rows)
    assert case.ratio("merged") is None
    (case,) = cases([*rows, row(impl="auto", ms_median=0.2, graph=False)])
    assert case.ratio("merged") == (pytest.approx(1.5), False)
    assert "0.300 ±1% (eager)" in cells(written(rows), "96@32", "256")
    # a capture that failed leaves the eager calls to look at
    (case,) = cases([*pair(0.1, 0.3, graph=False), row(impl="merged", ms_median=None, error="capture")])
    assert case.ratio("merged") == (pytest.approx(3), False)


def test_a_cold_cache_is_not_set_against_a_warm_one():
    rows = [row(impl="auto", ms_median=0.1), row(impl="merged", ms_median=0.3, l2="cold")]
    (case,) = cases(rows)
    assert case.ratio("merged") is None
    assert "cold L2" in written(rows)


def test_ours_is_auto_even_where_it_failed():
    rows = [row(impl="triton", ms_median=0.1), row(impl="hybrid", ms_median=0.05, passed=False)]
    assert cases(rows)[0].ours() == "triton"
    (case,) = cases([*rows, *pair(None, 0.3, passed=True)])
    assert (case.ours(), case.ratio("merged")) == ("auto", None)


def test_what_failed_its_gate_is_shown_with_its_error_and_counts_for_nothing():
    rows = [row(impl="auto", ms_median=0.1, passed=False, error="twice | too\nlarge"), row(impl="merged")]
    text = written(rows)
    assert "1 of 2 rows FAILED" in text
    assert r": twice \| too large" in text
    assert cells(text, "96@32", "256") == ["96@32", "256", "**0.100 ±1%**", "failed"]
    assert "over merged" not in text


def test_host_times_and_rates():
    text = written([row(graph=False, host_ms=0.0123, tflops=500.0, gbps=1500.0, roofline_fraction=0.61)])
    assert cells(text, "96@32", "256", "auto") == ["96@32", "256", "auto", "0.100", "500", "1500", "61%"]
    assert cells(text, "96@32", "256", "0.0123")
    model = row(suite="models", op="resnet18", shape="224", images_per_s=12345.6, peak_mib=789.0)
    assert cells(written([model]), "224", "256", "auto")[3:] == ["0.100", "12,346", "789"]


def test_the_head_says_where_it_was_measured():
    text = written([], git_dirty=True, absent={"tensorrt": "not installed"}, unreached=["a", "b"])
    for expected in (
        "Made-up GPU", "torch 9.8", "0123456789ab + changes", "feedbeefcafe", "tensorrt: not installed",
        "copy 4,000 GB/s, within the L2 9,000 GB/s, bf16 products 800 TFLOP/s",
    ):  # fmt: skip
        assert expected in text
    assert cells(text, "cases not reached")[1] == "2"


def test_what_is_known_of_the_device_within_and_without():
    text = written(device={"name": "Made-up GPU", "type": "cuda", "l2_mib": 50, "after": {"power_w": "7"}, "x": {}})
    assert "Made-up GPU (cuda, l2 mib 50, after power w 7)" in text


def test_a_cpu_says_so_and_nothing_of_a_gpu():
    text = written(pair(0.1, 0.3, graph=False), device=CPU, ceilings={})
    assert "figures of a CPU, on which the Triton kernels do not run" in text
    assert not re.search("GPU|CUDA|L2", text)
    assert "figures of a CPU" not in written(pair(0.1, 0.3))


def test_numbers_that_are_none_or_not_numbers():
    nothing = {"tflops": math.nan, "gbps": None, "roofline_fraction": math.inf, "host_ms": math.nan}
    rows = [
        row(suite="kernels", op=op, mode=mode, impl=impl, ms_median=ms, ms_q1=math.nan, **nothing)
        for op, (mode, _) in KERNELS.items()
        for impl, ms in (("triton", 0.1), ("merged", math.nan), ("cudnn", None), ("reference", 0.0))
    ]
    text = written(rows, ceilings={"copy_gbps": None, "l2_gbps": math.nan, "matmul_tflops": None})
    assert not re.search(r"\bnan\b|\binf\b|None", text)


def test_no_rows_leave_a_sentence_for_every_figure():
    blocks = report.build([results()])
    missing = [block for block in blocks if isinstance(block, report.Picture)]
    assert len(missing) == 2
    assert all(picture.png is None and "left out" in picture.caption for picture in missing)


def test_several_devices_or_none():
    with pytest.raises(ValueError, match="Made-up GPU, Made-up CPU"):
        report.build([results(), results(device=CPU)])
    with pytest.raises(ValueError, match="no results"):
        report.build([])


def test_of_rows_with_one_key_the_latest_is_shown():
    old, new = (results(pair(ms, 0.3), created=f"202{i}-01-01") for i, ms in enumerate((0.1, 0.2)))
    text = report.markdown(report.build([new, old]))
    assert cells(text, "96@32", "256", "auto")[3] == "1.50"
    assert "2 rows were measured more than once" in text


def test_every_row_is_there(folder):
    text, rows = (folder / "report.md").read_text(), made().rows
    failed = [r for r in rows if not r.passed]
    assert f"{len(failed)} of {len(rows)} rows FAILED" in text
    assert text.count("largest error 0.5") == 2 * len(failed)  # all together, and in their groups
    timed = [r for r in rows if r.passed and r.graph and r.l2 == "warm"]
    assert all(tables._three(r.ms_median) in text for r in timed)


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = [r for r in everything().rows if r.shape == "64@8" and r.suite == "kernels"]
    first, second = (report.write([results(rows)], tmp_path / name) for name in "ab")
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_pictures_decode_and_show_something(folder):
    names = {path.name for path in folder.glob("*.png")}
    assert {"roofline.png", "breakdown.png", "speedup_kernels_bf16.png", "speedup_models_bf16.png"} <= names
    for name in names:
        image = Image.open(folder / name).convert("RGB")
        assert min(image.size) > 300
        assert len(image.getcolors(maxcolors=10**6)) > 20
        assert f"({name})" in (folder / "report.md").read_text()


def test_the_breakdown_names_its_implementation():
    rows = [row(suite="kernels", op=op, mode=mode, impl="torch") for op, (mode, _) in KERNELS.items()]
    assert '"torch"' in plots.breakdown(cases(rows)).caption
    triton = row(suite="kernels", op="reduce", mode="bwd", impl="triton")
    picture = plots.breakdown(cases([*rows, triton]))
    assert '"triton"' in picture.caption
    assert "too short" in picture.caption  # of one kernel alone


class Page(HTMLParser):
    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(folder):
    text, page = (folder / "report.html").read_text(), Page()
    page.feed(text)
    assert page.open == []
    assert len(page.links) == len(list(folder.glob("*.png")))
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"url\(|@import|https?:", text)
    assert "prefers-color-scheme: dark" in text
    assert "0.01 &lt;b&gt;" in text  # an error's own text stays text
