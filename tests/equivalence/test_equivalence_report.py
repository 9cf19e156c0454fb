"""The report of compare: as text, as HTML, as plain data."""

import json
import math

from rir_kernels.equivalence.report import SHORT, EquivalenceReport, EquivalenceRow


def made_row(name="weight", passed=True, **values):
    numbers = {"error_max": 1e-6, "error_rms": 5e-7, "reference_error_max": 1e-6, "budget": 3e-6, "worst_channel": 1}
    return EquivalenceRow("param grad", name, (3, 2), "float32", **numbers | values, passed=passed)


def test_short_report_shows_every_row():
    report = EquivalenceReport((made_row(), made_row("bias", passed=False, error_max=1.0)), train=False)
    assert not report and not report.passed
    assert repr(report) == f"<EquivalenceReport: {report.headline()}>"
    lines = str(report).splitlines()
    assert lines[0] == "NOT EQUIVALENT in eval mode: 1 of 2 tensors within their budgets"
    assert len(lines) == 5
    assert lines[3].split() == [
        "ok",
        "param",
        "grad",
        "weight",
        "3x2",
        "float32",
        "1.0e-06",
        "5.0e-07",
        "1.0e-06",
        "3.0e-06",
        "1",
    ]
    assert lines[4].startswith("FAIL  param grad  bias ")
    columns = {line.index("float32") for line in lines[3:]}
    assert columns == {lines[2].index("dtype")}


def test_long_report_shows_the_worst():
    rows = [made_row(f"layer.{i}", error_max=1e-7) for i in range(SHORT)]
    rows += [made_row("close", error_max=2.9e-6), made_row("missing", False, error_max=None, budget=None)]
    report = EquivalenceReport(tuple(rows), train=True)
    text = str(report)
    assert text.index("missing") < text.index("close") and "layer.15" not in text
    assert f"... and {SHORT + 2 - 8} more rows" in text
    assert all(row.name in report.table(full=True) for row in rows)
    assert "param grad" in text and " 18 " in text and " 17 " in text  # tensors, passed


def test_blind_rows_are_counted():
    rows = (made_row(), EquivalenceRow(**vars(made_row("x")) | {"note": "blind: rounding alone moves it by 50%"}))
    assert "1 of them blind" in EquivalenceReport(rows, train=True).headline()


def test_html_escapes():
    name = "<script>&'\""
    for rows in ((made_row(name),), (made_row(name, passed=False),) * (SHORT + 1)):
        html = EquivalenceReport(rows, train=True)._repr_html_()
        assert "<script" not in html and "&lt;script&gt;&amp;" in html
        assert html.count("<table>") == html.count("</table>") > 0
    assert "<details>" in html and "color" in html


def test_to_dict_is_strict_json():
    rows = (made_row(), made_row("inf", False, error_max=math.inf, error_rms=math.nan), made_row("scalar"))
    plain = EquivalenceReport(rows, train=True).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert (plain["passed"], plain["train"], plain["rows"][1]["error_max"]) == (False, True, None)
    assert plain["rows"][0] | {"note": ""} == plain["rows"][0] and plain["rows"][0]["shape"] == [3, 2]
