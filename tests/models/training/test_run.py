"""What a run does, step by step, against the same written out with plain layers."""

import json
import time

import pytest
import torch
import torch.nn.functional as F

import rir_kernels as rir
from models import create
from models.data.augment import batch, plan_epoch
from models.training import build, report, run
from models.training.average import Average
from models.training.errors import SettingsError
from rir_kernels.common.memory_format import is_channels_last
from tests.models.training.small import images, settings, start, weights


def plain_training(first, chosen):
    """The run written out: naive layers in fp64 that start as `first`, and lists of what should have been recorded."""
    data, recipe = images(), chosen.recipe
    model = create("rir18_thin", in_channels=1, depth=(1, 1, 1), layers=rir.reference, dtype=torch.float64)
    with torch.no_grad():
        model.stem.load_state_dict(first.stem.state_dict())
        model.head.load_state_dict(first.head.state_dict())
        for ours, theirs in zip(model.blocks(), first.blocks(), strict=True):
            ours.load_state_dict(theirs.to_reference().state_dict())
    mean, std = (value.view(1, -1, 1, 1) for value in (data.mean, data.std))
    averaged = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0)
    records, step = [], 0
    for epoch in range(recipe.epochs):
        count, moved = len(data.train_y), {"padding": 1, "flip": True, "jitter": data.jitter}
        plan = plan_epoch(count, seed=chosen.seed, epoch=epoch, **moved)
        losses, right = [], 0
        for number in range(3):
            x, y = batch(data.train_x, data.train_y, plan, 32 * number, 32 * number + 32, padding=1)
            # normalisation is in fp32 whatever the network's precision
            scores = model(((x.float() - mean.float()) / std.float()).double())
            loss = F.cross_entropy(scores, y, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            for p in model.parameters():
                if p.dim() > 1:
                    p.grad += recipe.weight_decay * p.detach()
            for group in optimizer.param_groups:
                group["lr"] = 0.1 if step < round(9 * 42 / 82) else 0.01 if step < round(9 * 62 / 82) else 0.001
            optimizer.step()
            decay = min(0.9, (1 + step) / (10 + step))
            for name, value in model.state_dict().items():
                averaged[name] = decay * averaged[name] + (1 - decay) * value if value.is_floating_point() else value
            losses.append(loss.item())
            right += (scores.argmax(1) == y).sum().item()
            step += 1
        keep = {name: t.clone() for name, t in model.state_dict().items()}
        model.load_state_dict(averaged)
        with torch.no_grad():
            scores = model.eval()(((data.test_x.float() - mean.float()) / std.float()).double())
        model.train().load_state_dict(keep)
        records.append(
            {
                "train_loss": sum(losses) / 3,
                "train_accuracy": 100 * right / 96,
                "test_loss": F.cross_entropy(scores, data.test_y).item(),
                "test_accuracy": 100 * (scores.argmax(1) == data.test_y).float().mean().item(),
            }
        )
    return records


def test_every_number_is_that_of_the_loop_written_out(tmp_path):
    changes = {"precision": "fp64", "schedule": "steps", "label_smoothing": 0.1, "weight_decay": 1e-3}
    found = start(tmp_path, **changes)
    expected = plain_training(found.model, settings(**changes))
    assert found.train()
    for record, other in zip(found.records, expected, strict=True):
        # fp64 through nine steps, which enlarge a rounding error of 1e-16 some thousand times
        assert {name: record[name] for name in other} == pytest.approx(other, rel=1e-7)
    assert found.records == [json.loads(line) for line in (tmp_path / run.METRICS).read_text().splitlines()]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    found = [start(tmp_path / str(i), seed=seed, epochs=1) for i, seed in enumerate((3, 3, 4))]
    for each in found:
        each.train()
    first, again, other = map(weights, found)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.stem.conv.weight"], other["model.stem.conv.weight"])


def test_without_augmentation_images_are_as_they_are(tmp_path):
    assert images().jitter is not None
    for augment, expected in ((True, (1, True, images().jitter)), (False, (0, False, None))):
        found = start(tmp_path, augment=augment)
        assert (found.padding, found.flip, found.jitter) == expected


def test_the_first_step_of_a_piece_is_not_timed(tmp_path, monkeypatch):
    """Whoever compiles does so in it."""
    update, slow = run.Run._update, [0.5]

    def updating(self, plan):
        if slow:
            time.sleep(slow.pop())
        update(self, plan)

    monkeypatch.setattr(run.Run, "_update", updating)
    found = start(tmp_path, epochs=1)
    found.train()
    assert 0 < found.seconds < 0.5


def test_images_lie_as_the_weights_do(tmp_path):
    """channels_last, grey ones too; but for what crashes in oneDNN: strided 1x1 convolutions on a CPU."""
    for options, channels_last in (({}, True), ({"shortcut": "projection"}, False)):
        found, seen = start(tmp_path, options={"depth": [1, 1, 1]} | options, epochs=1), []
        found.model.stages[1].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        weight = found.model.stages[1][0].layers[0].weight
        found.prepare()
        found._update(run.augment.plan_epoch(100, seed=0, epoch=0, padding=1, flip=False))
        assert is_channels_last(seen[0]) == is_channels_last(weight) == channels_last


def test_the_kept_weights_give_the_recorded_accuracy(tmp_path):
    found = start(tmp_path)
    found.train()
    model, facts = build.load(tmp_path / run.WEIGHTS)
    mean, std = (value.float().view(1, -1, 1, 1) for value in (images().mean, images().std))
    with torch.no_grad():
        scores = model((images().test_x - mean) / std)
    accuracy = 100 * (scores.argmax(1) == images().test_y).float().mean().item()
    assert accuracy == pytest.approx(found.records[-1]["test_accuracy"])
    assert facts["data"] == found.data
    assert not model.training


def test_an_average_counts_and_forgets():
    model = torch.nn.BatchNorm1d(2)
    average = Average(model, 0.5)
    for step, value in enumerate((10.0, 20.0, 30.0)):
        torch.nn.init.constant_(model.weight, value)
        model.num_batches_tracked.fill_(step)
        average.update(model, step)
    # d = 1/10, 2/11, 3/12 of 1, then of what came before
    expected = 1.0
    for decay, value in ((1 / 10, 10), (2 / 11, 20), (3 / 12, 30)):
        expected = decay * expected + (1 - decay) * value
    assert average.model.weight.tolist() == pytest.approx([expected] * 2, rel=1e-6)
    assert average.model.num_batches_tracked == 2
    average.update(model, 1000)
    assert average.model.weight.tolist() == pytest.approx([0.5 * expected + 15] * 2, rel=1e-6)
    assert not any(p.requires_grad for p in average.model.parameters())


def test_naive_layers_are_trained_too(tmp_path):
    found = start(tmp_path, impl="reference", epochs=1)
    found.train()
    assert any(isinstance(module, rir.reference.RiRLayer) for module in found.model.modules())
    model, _ = build.load(tmp_path / run.WEIGHTS)
    assert any(isinstance(module, rir.reference.RiRLayer) for module in model.modules())


def test_what_cannot_be_run_is_said_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    for changes, message in (
        ({"batch_size": 101}, "has 100 images to train on: fewer than a batch of 101"),
        ({"model": "rir19"}, "no network is called 'rir19'"),
        ({"options": {"width_of": 3}}, "rir18_thin: .*width_of"),
        ({"quantize": "4"}, "quantize takes bits of weights and activations as in W4A4, got '4'"),
        ({"compile": True, "graphs": True}, "exclude each other"),
        (
            {"options": {"depth": [1, 1, -1]}},
            r"depth must have a number of blocks for each stage, 0 or more, got \(1, 1, -1\)",
        ),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*63\), got -1"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp64, got 'fp8'"),
    ):
        with pytest.raises(SettingsError, match=message):
            start(out, **changes)
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="file is a file, and a run needs a folder"):
        start(tmp_path / "file")
    with pytest.raises(SettingsError, match="graphs are CUDA graphs, and this run is on cpu"):
        start(out, graphs=True).train()
    assert not out.exists()


def test_run_json_and_curves(tmp_path):
    found = start(tmp_path, epochs=1)
    found.train()
    report.write(found)
    facts = json.loads((tmp_path / report.RUN).read_text())
    assert facts["result"]["test_accuracy"] == found.records[-1]["test_accuracy"]
    assert facts["result"]["finished"]
    assert facts["model"]["parameters"] == sum(p.numel() for p in found.model.parameters())
    assert facts["settings"]["recipe"]["batch_size"] == 32
    assert len(facts["sources_hash"]) == 64
    assert (tmp_path / report.CURVES).read_bytes().startswith(b"\x89PNG")
