"""The commands from end to end, on a CPU."""

import json

import pytest

from bench import cli
from bench.measure import run
from bench.schema import load
from rir_kernels.backends import aten

FAST = ["--device", "cpu", "--quick", "--ops", "rir_layer", "--batch", "2"]


def bench(*arguments):
    return cli.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A results file of one layer."""
    folder = tmp_path_factory.mktemp("bench")
    assert bench("layers", *FAST, "--impl", "reference", "torch", "triton", "--out", folder) == 0
    return folder / "layers.json"


def test_layers(measured):
    results = load(measured)
    assert results.device["type"] == "cpu" and results.device["threads"] >= 1
    assert results.absent == {"triton": "its kernels need a CUDA device (the interpreter's time would say nothing)"}
    assert results.ceilings.keys() == {"copy_gbps", "matmul_tflops"}
    assert len(results.sources_hash) == 64
    assert results.command.startswith("python -m bench layers --device cpu --quick")
    assert {(row.impl, row.mode) for row in results.rows} == {
        (impl, mode) for impl in ("reference", "torch") for mode in ("eval", "train_fwd", "step", "bwd")
    }
    assert all(row.passed and not row.graph for row in results.rows)
    # the backward pass is a difference, and a busy machine may leave nothing of it
    assert all(row.ms_median > 0 for row in results.rows if row.mode != "bwd")


def test_report_and_compare_work_on_it(measured, capsys, tmp_path):
    assert bench("report", measured, "--out", tmp_path) == 0
    assert {"report.md", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    assert "rir_layer" in (tmp_path / "report.md").read_text()
    assert bench("compare", measured, measured) == 0

    slower = json.loads(measured.read_text())
    for row in slower["rows"]:
        row |= {name: 100 * (row[name] or 0) for name in ("ms_median", "ms_q1", "ms_q3")}
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    assert bench("compare", measured, tmp_path / "slower.json", "--fail-if-slower", "5%") == 1
    assert bench("compare", tmp_path / "slower.json", measured) == 0


def test_a_wrong_implementation_fails_the_command(monkeypatch, capsys, tmp_path):
    right = aten.conv_bn_act
    monkeypatch.setattr(aten, "conv_bn_act", lambda *args, **options: right(*args, **options) * 1.01)
    assert bench("layers", *FAST, "--impl", "reference", "torch", "--out", tmp_path) == 1
    printed = capsys.readouterr().out
    assert "REFUSED" in printed and "beyond their error budgets" in printed
    rows = load(tmp_path / "layers.json").rows
    assert all(row.passed == (row.impl == "reference") for row in rows)


def test_a_wrong_peer_does_not(monkeypatch, tmp_path):
    from bench.peers.merged import MergedRiRLayer

    right = MergedRiRLayer.forward
    monkeypatch.setattr(MergedRiRLayer, "forward", lambda self, x: right(self, x) * 1.01)
    assert bench("layers", *FAST, "--impl", "merged", "torch", "--out", tmp_path) == 0
    rows = load(tmp_path / "layers.json").rows
    assert all(row.passed == (row.impl == "torch") for row in rows)


def test_every_case_is_kept_at_once(monkeypatch, tmp_path):
    def interrupted(title, rows):
        if title.startswith("basic_block"):
            raise KeyboardInterrupt

    monkeypatch.setattr(run.live, "show", interrupted)
    arguments = ["--device", "cpu", "--quick", "--batch", "2", "--impl", "torch", "--out", tmp_path]
    with pytest.raises(KeyboardInterrupt):
        bench("layers", *arguments)
    assert {row.op for row in load(tmp_path / "layers.json").rows} == {"rir_layer"}


def test_time_runs_out(capsys, tmp_path):
    assert bench("layers", *FAST, "--impl", "torch", "--minutes", "0", "--out", tmp_path) == 0
    results = load(tmp_path / "layers.json")
    assert results.rows == [] and results.unreached == ["rir_layer 16@32 x2 fp32"]
    assert "1 cases were not reached" in capsys.readouterr().out


def test_a_lost_device_keeps_what_was_measured(monkeypatch, tmp_path):
    class Lost(run.Runner):
        def run(self, case, reach):
            rows = super().run(case, reach)
            yield next(rows)
            raise run.timing.DeviceLost("gone")

    monkeypatch.setattr(run, "Runner", Lost)
    with pytest.raises(SystemExit, match="the device is lost: gone"):
        bench("layers", *FAST, "--impl", "torch", "--out", tmp_path)
    results = load(tmp_path / "layers.json")
    assert len(results.rows) == 1 and results.device["lost"] == "gone"
    assert results.unreached == ["rir_layer 16@32 x2 fp32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", "--impl", "tritn"], "--impl: unknown 'tritn'; there are reference, merged"),
        (["layers", "--dtype", "fp8"], "--dtype: unknown 'fp8'; there are bf16, fp16, fp32"),
        (["layers", "--shapes", "96@33", "--device", "cpu"], "did you mean '96@32'"),
        (["layers", "--batch", "0"], "--batch: expected numbers of images"),
        (["layers", "--ops", "rir_lyer", "--device", "cpu"], "--ops: unknown 'rir_lyer'"),
        (["compare", "none.json", "none.json"], "cannot be read"),
        (["report", "nowhere.json"], "cannot be read"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys, tmp_path):
    if arguments[0] == "layers":
        arguments = [*arguments, "--out", tmp_path]
    with pytest.raises(SystemExit) as stopped:
        bench(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_suites_need_no_name(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(run, "run_suite", lambda suite, *args, **options: ran.append(suite) or run._results)
    monkeypatch.setattr(run, "refused_ours", lambda results: [])
    monkeypatch.setattr(cli, "_report", lambda options, arguments: ran.append("report"))
    assert bench("--quick", "--out", tmp_path) == 0
    assert ran == ["kernels", "layers", "models", "report"]


@pytest.mark.gpu
@pytest.mark.real_gpu("time")
def test_every_suite_on_a_gpu(tmp_path):
    """All ways of timing, all implementations that are there, and the report."""
    status = bench("--quick", "--shapes", "16@32", "--out", tmp_path)
    rows = [row for suite in ("kernels", "layers") for row in load(tmp_path / f"{suite}.json").rows]
    assert status == 0, [row for row in rows if row.error]
    timed = {(row.impl, row.graph, row.l2) for row in rows if row.ms_median}
    for impl in ("reference", "merged", "compile", "torch", "hybrid", "triton", "auto"):
        assert {(impl, False, "warm"), (impl, True, "warm"), (impl, True, "cold")} <= timed
    assert (tmp_path / "report.html").exists()
