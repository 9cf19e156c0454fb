"""Every row of docs/faults.json has a test, and docs/faults.md is what is written from them."""

import json

from bench.tools import faults

ROWS = json.loads((faults.ROOT / "docs" / "faults.json").read_text())
JUNIT = """<testsuites><testsuite timestamp="2026-01-02T03:04:05">
<testcase classname="a" name="test_row_07_shapes[x]"/><testcase classname="a" name="test_row_07_shapes[y]"/>
<testcase classname="a" name="test_row_07_streams"><skipped message="no GPU"/></testcase>
<testcase classname="b" name="test_row_08_channels"><failure>no</failure></testcase>
<testcase classname="b" name="test_something_else"/>
</testsuite></testsuites>"""


def test_every_row_has_a_test_and_every_test_a_row():
    tests = faults.tests_by_row(faults.ROOT / "tests")
    assert [row["row"] for row in ROWS] == list(range(1, 61))
    assert sorted(set(range(1, 61)) - set(tests)) == [], "rows without a test"
    assert sorted(set(tests) - set(range(1, 61))) == [], "tests without a row"


def test_the_page_is_what_is_written():
    """`python -m bench.tools.faults --out docs` after a change of tests or rows."""
    written = (faults.ROOT / "docs" / "faults.md").read_text()
    assert written == faults.page(ROWS, faults.tests_by_row(faults.ROOT / "tests"))


def test_a_run_is_noted(tmp_path):
    """By place: the newest run of each, and rows that it had no test of stay."""
    (tmp_path / "run.xml").write_text(JUNIT)
    rows = [{"row": 7, "seen": [{"where": "GPU", "day": "before"}]}, {"row": 8}, {"row": 9}]
    for torch in ("2.9", "2.10"):
        faults.note(rows, tmp_path / "run.xml", "CPU", {"torch": torch, "triton": "3.6.0"})
    place = {"where": "CPU", "day": "2026-01-02", "torch": "2.10", "triton": "3.6.0"}
    assert rows[0]["seen"] == [place | {"passed": 2, "skipped": 1, "failed": 0}, {"where": "GPU", "day": "before"}]
    assert rows[1]["seen"] == [place | {"passed": 0, "skipped": 0, "failed": 1}]
    assert rows[2] == {"row": 9}


def test_the_page_tells_tests_and_places(tmp_path):
    (tmp_path / "tests" / "deep").mkdir(parents=True)
    (tmp_path / "tests" / "deep" / "test_a.py").write_text("raise OSError\n\ndef test_row_07_shapes(): ...\n")
    tests = faults.tests_by_row(tmp_path / "tests")
    assert tests == {7: [("tests/deep/test_a.py", "test_row_07_shapes")]}
    assert faults.rows_of("test_rows_17_and_18_in_the_image[inf]") == [17, 18]
    seen = {"where": "CPU", "day": "2026-01-02", "torch": "2", "triton": "3", "passed": 2, "skipped": 1, "failed": 0}
    text = faults.page([{"row": 7, "fault": "f", "behaviour": "b", "seen": [seen]}], tests)
    assert (
        "| 7 | f | b | [test_row_07_shapes](../tests/deep/test_a.py) | "
        "CPU, 2026-01-02, torch 2, triton 3: 2 passed, 1 skipped |" in text
    )
