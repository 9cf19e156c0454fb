"""Memory kept for backward: by formula, by the allocations of real steps, and as the committed pages have it."""

import contextlib
import dataclasses
import gc
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import rir_kernels as rir
from bench import cli, schema
from bench.memory import document, networks, run
from bench.memory.count import kept
from bench.memory.networks import FORMS, NETWORKS, Network, count

ROOT = Path(__file__).parents[2]
CHANNELS, SIZE, HALF = 8, 4, 2  # HALF: bytes of a number in 16 bits
PIXELS = SIZE * SIZE


class Block(nn.Module):
    """A ResNet's: two units of conv and norm, the identity, ReLU in place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def _plain():
    stem = (nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10, bias=False))


def _fused(impl="hybrid"):
    model = _plain()
    assert [item.pattern for item in rir.fuse_(model, impl=impl).replaced] == [
        "conv_bn_act",
        "conv_bn_act",
        "conv_bn_add_act",
    ]
    return model


TINY = Network("tiny", SIZE, _plain, _fused)
# the image in 16 bits; z and y of three units; the pooled features, log-probabilities in fp32
PER_IMAGE = HALF * (3 * PIXELS + 6 * CHANNELS * PIXELS + CHANNELS) + 4 * 10
# the weights in 16 bits; mean and invstd of three norms in fp32, the loss's total weight
FIXED = HALF * (9 * CHANNELS * (3 + 2 * CHANNELS) + 10 * CHANNELS) + 4 * (3 * 2 * CHANNELS + 1)
# the stem's y, and that of the block's first unit; not that of its second, which a residual has joined
MADE_AGAIN = HALF * 2 * CHANNELS * PIXELS


@pytest.mark.parametrize("form", ["eager", "fused", "fused_recompute"])
def test_by_formula(form):
    found = count(TINY, form, 256)
    assert (found.per_image, found.fixed) == (PER_IMAGE - MADE_AGAIN * (form == "fused_recompute"), FIXED)
    assert found.at(256) == 256 * found.per_image + FIXED


def test_the_line_holds_elsewhere():
    found = count(TINY, "fused_recompute", 256)
    for batch in (1, 7):
        assert networks._eager(TINY, "fused_recompute", batch) == found.at(batch)


def test_recompute_across_a_convolution_that_stays_unfused():
    """The outputs of both fused units are made again: what is between them is channels_last, as they are."""

    def plain():
        def unit(*act):
            return nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS), *act

        first = nn.Conv2d(3, CHANNELS, 1, bias=False)
        depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False)
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(first, *unit(nn.ReLU()), depthwise, *unit(), nn.Conv2d(CHANNELS, 10, 1), *pool)

    def fused():
        model = plain()
        assert len(rir.fuse_(model, impl="hybrid").replaced) == 2
        return model

    network = Network("depthwise", SIZE, plain, fused)
    kept_by_both, made_again = (count(network, form, 2).per_image for form in ("fused", "fused_recompute"))
    assert kept_by_both - made_again == MADE_AGAIN


def test_a_relu_that_is_not_in_place_keeps_as_much():
    def plain():
        model = _plain()
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        return model

    assert count(dataclasses.replace(TINY, plain=plain), "eager", 2) == count(TINY, "eager", 2)


@pytest.mark.interpreter
def test_real_steps_allocate_as_much():
    """Our kernels in the interpreter, by their plans; the profiler sees what is allocated and freed."""
    model = _fused("triton").to(memory_format=torch.channels_last)
    images = networks._images(TINY, 2)
    networks._loss(model, *images, torch.float16)  # leaves the plans
    for form, within in (("fused", contextlib.nullcontext), ("fused_recompute", rir.recompute)):
        gc.collect()  # what earlier tests have left would be freed at any time
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            loss = networks._loss(model, *images, torch.float16, within)
            gc.collect()
        allocated = sum(event.self_cpu_memory_usage for event in seen.key_averages())
        assert allocated - loss.untyped_storage().nbytes() == count(TINY, form, 2).at(2)
        del loss


def test_views_count_by_their_storage_and_what_is_there_not_at_all():
    x = torch.randn(8, 8, requires_grad=True)

    def step():
        y = x.exp()  # kept by itself and, as two views, by the product
        return (y[:4] * y[4:]).sum()

    assert kept(step, [x]) == 8 * 8 * 4
    assert kept(lambda: (x * x).sum(), [x]) == 0
    assert kept(lambda: (x * x).sin().sum(), []) == 8 * 8 * 4  # the product, for the sine; x was not allocated here


def test_compiled_keeps_what_its_function_saves(monkeypatch):
    """Against the tensors that it hands to autograd; and no more than eager keeps."""

    def by_hooks(step, there_anyway):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            step()
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
        for tensor in there_anyway:
            storages.pop(tensor.untyped_storage()._cdata, None)
        return kept(step, there_anyway), sum(storages.values())

    monkeypatch.setattr(networks, "kept", by_hooks)
    alive, saved = networks._compiled(TINY, "compile", 256)
    assert alive == saved
    assert 256 * HALF * 3 * CHANNELS * PIXELS < alive <= 256 * PER_IMAGE + FIXED  # z of three units at the least


def test_the_committed_counts_are_of_this_code():
    rows = document.load(ROOT / document.COUNTED)["rows"]
    name, form = "rir18_wide", "fused_recompute"
    (row,) = [row for row in rows if (row["network"], row["form"]) == (name, form)]
    assert count(NETWORKS[name], form, 256) == networks.Count(row["per_image"], row["fixed"])


def test_the_committed_file_is_whole():
    data = document.load(ROOT / document.COUNTED)
    assert data["device"] == {"name": "none", "type": "counted"} and data["batch"] == 256 and not data["git_dirty"]
    assert {(row["network"], row["form"]) for row in data["rows"]} == {(n, f) for n in NETWORKS for f in FORMS}
    assert all(row["bytes"] == row["fixed"] + 256 * row["per_image"] for row in data["rows"])


def test_pages_agree_with_the_committed_file():
    assert document.current(ROOT), "run `python -m bench headline`"
    assert (ROOT / document.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    monkeypatch.setattr(run, "FORMS", {"eager": "eager", "fused": "fused"})
    assert cli.main(["memory", "--out", str(tmp_path), "--networks", "tiny", "--batch", "16"]) == 0
    printed = capsys.readouterr().out
    assert "tiny" in printed and f"({PER_IMAGE / 1e6:.2f})" in printed
    data = document.load(tmp_path / "memory.json")
    assert data["command"].startswith("python -m bench memory --out") and len(data["sources_hash"]) == 64
    assert [row["bytes"] for row in data["rows"]] == [16 * PER_IMAGE + FIXED] * 2
    assert schema.kind_of(tmp_path / "memory.json") == "memory"


def test_what_is_not_there_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(networks.libraries, "torchvision", lambda: None)
    assert cli.main(["memory", "--out", str(tmp_path), "--networks", "resnet18"]) == 1
    assert "ResNet-18, eager: torchvision does not import here" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--networks", "resnet19"], "--networks: unknown 'resnet19'"), (["--batch", "0"], "--batch: expected numbers")],
)
def test_mistakes_are_named(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["memory", "--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "memory.json"
    for text, message in (("{", "cannot be read as JSON"), (json.dumps({"schema": 1}), "expected kind and schema")):
        path.write_text(text)
        with pytest.raises(schema.ResultsError, match=message):
            document.load(path)
