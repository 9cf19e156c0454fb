"""The demo: its data, its training and its report; as a whole, under `long`."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rir_kernels as rir
from demo import __main__ as demo
from demo import data, report, speeds, story, training
from rir_kernels.triton.shapes import Shape

EPS = torch.finfo(torch.float32).eps


# data


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits(digits):
    assert digits.train_x.shape == (1437, 1, 8, 8)
    assert digits.test_x.shape == (360, 1, 8, 8)
    assert digits.train_x.is_contiguous(memory_format=torch.channels_last)
    assert digits.train_x.mean().abs() < 1e-5
    assert (digits.train_x.std() - 1).abs() < 1e-5
    assert set(digits.test_y.tolist()) == set(range(10))


def test_digits_do_not_depend_on_the_global_seed(digits):
    torch.manual_seed(1)
    assert torch.equal(digits.train_x, data.load("digits").train_x)


def test_part_of_the_images():
    images = data.load("digits", train_images=200, test_images=100)
    assert (len(images.train_y), len(images.test_y)) == (200, 100)


def test_batches():
    x = torch.arange(10.0)[:, None, None, None].expand(-1, 1, 2, 2)
    images = data.Images("numbers", 10, x, torch.arange(10), x, torch.arange(10))
    batches = list(images.batches(batch=4, steps=5, seed=0))
    assert all(torch.equal(x[:, 0, 0, 0].long(), y) for x, y in batches)
    labels = [y.tolist() for _, y in batches]
    assert len(set(labels[0] + labels[1])) == 8  # no image twice before the next shuffle
    assert [y.tolist() for _, y in images.batches(4, 5, seed=0)] == labels
    assert [y.tolist() for _, y in images.batches(4, 5, seed=1)] != labels
    with pytest.raises(ValueError, match="1 to 10"):
        next(images.batches(11, 1, seed=0))


# training


class Tiny(torch.nn.Module):
    """A RiR layer and a head."""

    def __init__(self):
        super().__init__()
        self.layer = rir.reference.RiRLayer(2, 8, stride=2)
        self.head = torch.nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.layer(x.expand(-1, 2, -1, -1)).mean((2, 3)))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Tiny()


def test_same_weights_and_batches_give_the_same_losses(tiny, digits):
    calls = []
    curves = training.train(
        {"naive": tiny, "fused": copy.deepcopy(tiny)}, digits, steps=3, batch=16, seed=0, on_step=calls.append
    )
    assert curves.losses["naive"] == curves.losses["fused"]
    assert curves.difference("naive", "fused") == [0.0, 0.0, 0.0]
    assert calls[-1] == {name: losses[-1] for name, losses in curves.losses.items()}
    assert curves.losses["naive"][0] != curves.losses["naive"][-1]
    assert 0 < curves.median_seconds("naive") < 60


def test_first_loss_of_the_fused_network(tiny, digits):
    fused = copy.deepcopy(tiny)
    rir.fuse_(fused)
    x, y = next(digits.batches(16, 1, seed=0))
    losses = [training.train_step(model, training.make_optimizer(model, 1)[0], x, y) for model in (tiny, fused)]
    assert losses[0] == pytest.approx(losses[1], rel=16 * EPS)


def test_control_differs_by_a_rounding(tiny):
    control = training.control_of(tiny, EPS, seed=0)
    for ours, theirs in zip(control.parameters(), tiny.parameters(), strict=True):
        assert ((ours - theirs).abs() <= 2 * EPS * theirs.abs()).all()
    assert not torch.equal(control.head.weight, tiny.head.weight)


@pytest.mark.parametrize(
    ("fused", "accuracy", "failed"),
    [
        ([2.0, 1.001, 0.5], 90.0, set()),
        ([2.001, 1.001, 0.5], 90.0, {0}),
        ([2.0, 1.1, 0.5], 90.0, {1}),
        ([2.0, float("nan"), 0.5], 90.0, {1}),
        ([2.0, 1.001, 0.5], 70.0, {2}),
    ],
)
def test_judge(fused, accuracy, failed):
    losses = {"naive": [2.0, 1.0, 0.5], "fused": fused, "control": [2.0, 1.002, 0.501]}
    accuracies = {"naive": 91.0, "fused": accuracy, "control": 92.0}
    checks = training.judge(training.Curves(losses, {}), accuracies, EPS, tested=300)
    assert {i for i, check in enumerate(checks) if not check.passed} == failed


def test_check_unfuse(tiny, digits):
    fused, x = copy.deepcopy(tiny), digits.test_x[:8]
    rir.fuse_(fused)
    assert training.check_unfuse(fused, tiny, rir.unfuse_, x).passed
    rir.fuse_(fused)
    assert not training.check_unfuse(fused, tiny, lambda model: model, x).passed


# speeds


@pytest.mark.interpreter
def test_every_implementation_is_timed():
    once = speeds.timing.Settings(rounds=1, sample_ms=0.0, warmup=0)
    rows = speeds.measure(Shape(6, 6, size=5, batch=2), torch.device("cpu"), torch.float32, once)
    assert [row["mode"] for row in rows] == ["inference", "training step"]
    for row in rows:
        assert list(row["ms"]) == ["naive", "auto", "triton", "hybrid", "torch"]
        assert min(row["ms"].values()) > 0
        assert (
            row["ms"]["triton"] > 10 * row["ms"]["torch"]
        )  # the interpreter is that slow: each ran what its name says


# report


def equivalence(train, name="conv.weight"):
    row = {
        "kind": "param grad", "name": name, "shape": [2], "dtype": "float32", "error_max": 1e-6, "error_rms": 1e-7,
        "reference_error_max": 2e-6, "budget": 5e-6, "worst_channel": 0, "passed": True, "note": "",
    }  # fmt: skip
    rows = [row, row | {"name": "layers.0.bn.weight"}, row | {"kind": "buffer", "error_max": 0.0, "budget": 0.0}]
    return {"passed": True, "train": train, "rows": rows}


@pytest.fixture
def results():
    """What the demo finds, in small; names that HTML must not take for its own."""
    curves = training.Curves(
        {"naive": [2.0, 1.0], "fused": [2.0, 1.001], "control": [2.0, 1.002]},
        {name: [0.2, 0.1] for name in ("naive", "fused", "control")},
    )
    accuracies = {name: 90.0 for name in curves.losses}
    kernel = {
        "shape": "96@32", "dtype": "bf16", "op": "forward", "kernel": "_conv_fwd_kernel", "config": "", "registers": 90,
        "spills": 0, "shared_kb": 64.0, "products": 2, "conversions": 0, "local_loads": 0, "warnings": [], "faults": [],
        "passed": True,
    }  # fmt: skip
    replaced = {
        "name": "<script>alert(1)</script>",
        "pattern": "conv_add_bn_act",
        "kind": "RiRLayer",
        "impl": "auto",
        "parts": [],
    }
    return {
        "schema": 1, "passed": True, "failures": [], "skipped": {"speeds": "No GPU & no speed."},
        "seconds": {"Environment": 0.1}, "environment": {"torch": "<b>2</b>"},
        "device": {"type": "cpu", "name": "a CPU"},
        "data": {"name": "digits", "image": [1, 8, 8], "train": 2, "test": 1},
        "settings": {"steps": 2, "batch": 1, "seed": 0, "impl": "auto"},
        "network": {"name": "Tiny", "width": [8], "parameters": 1234},
        "fusion": {"model": "Tiny", "dry_run": False, "replaced": [replaced], "skipped": []},
        "equivalence": [equivalence(True, "a<b>.weight"), equivalence(False)],
        "training": training.summary(curves, accuracies, training.judge(curves, accuracies, EPS, tested=300)),
        "kernels": [{"title": "8 to 8", "dtype": "float32", **equivalence(True)}],
        "compiled": {"arch": "sm_90", "shared_kb": 227, "rows": [kernel]},
        "speeds": [], "emulated": [],
    }  # fmt: skip


def test_page_is_self_contained_and_escaped(results):
    page = report.build(results)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|file:)|url\((?!#)|@import|<script|<link""", page)
    assert "a&lt;b&gt;.weight" in page
    assert "&lt;b&gt;2&lt;/b&gt;" in page
    assert "No GPU &amp; no speed." in page
    assert page.count("<svg") == 4
    assert "#0100" not in page  # the figures' stand-in colours
    for name in re.findall(r"var\((--\w+)\)", page):
        assert f"{name}:" in page


def test_page_says_what_failed(results):
    assert "<title>rir_kernels: equivalent</title>" in report.build(results)
    results |= {"passed": False, "failures": ["a tensor < its budget"]}
    page = report.build(results)
    assert "<title>rir_kernels: NOT equivalent</title>" in page
    assert "a tensor &lt; its budget" in page


def test_page_with_speeds_and_without_kernels(results):
    names = ("naive", "auto", "triton", "hybrid", "torch")
    row = {"shape": "96@32", "batch": 256, "mode": "inference", "ms": dict.fromkeys(names, 0.5)}
    results["speeds"] = [row, row | {"mode": "training step"}]
    assert "0.500" in report.build(results)
    results["kernels"], results["compiled"]["rows"] = [], []
    results["skipped"] = {"kernels": "no kernels", "compiled": "no compiler"}
    assert "no compiler" in report.build(results)


def test_page_with_what_was_emulated(results):
    results["emulated"] = [{"title": "8 to 9", "dtype": "bfloat16", **equivalence(True)}]
    page = report.build(results)
    assert "The compiled kernels, emulated" in page and "8 to 9" in page and "bf16" in page
    assert "No GPU &amp; no speed." not in page


def test_files(results, tmp_path):
    results["training"]["difference"]["fused"][0] = float("inf")
    page, plain = report.write(results, tmp_path / "new" / "folder")
    assert page.name == "report.html"
    found = json.loads(plain.read_text())
    assert found["schema"] == 1
    assert found["training"]["difference"]["fused"][0] is None
    assert found["equivalence"] == results["equivalence"]


@pytest.mark.parametrize(("failures", "status"), [([], 0), (["other numbers"], 1)])
def test_exit_status(results, tmp_path, monkeypatch, capsys, failures, status):
    results |= {"passed": not failures, "failures": failures}
    monkeypatch.setattr(story, "tell", lambda args: results)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # as main would, but undone
    assert demo.main(["--out", str(tmp_path)]) == status
    printed = capsys.readouterr().out
    assert ("equivalent: NO" in printed) == bool(status)
    assert all(failure in printed for failure in failures)


@pytest.mark.parametrize("argument", ["--steps", "--batch"])
def test_numbers_below_one_are_refused(argument, capsys):
    with pytest.raises(SystemExit):
        demo.main([argument, "0"])
    assert "at least 1" in capsys.readouterr().err


def test_folder_without_data_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # as main would, but undone
    with pytest.raises(SystemExit):
        demo.main(["--data", str(tmp_path)])
    assert "--data: " in (error := capsys.readouterr().err)
    assert "it is empty" in error


@pytest.mark.long
def test_whole(tmp_path):
    command = [sys.executable, "-m", "demo", "--steps", "4", "--out", str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equivalent: yes" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["passed"]
    assert len(results["training"]["losses"]["fused"]) == 4
    assert "<svg" in (tmp_path / "report.html").read_text()
