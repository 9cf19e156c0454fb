"""python -m models.train and python -m models.evaluate, as a user types them."""

import itertools
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from models import evaluate, train
from models.training import run, settings
from models.training.errors import SettingsError
from models.training.progress import TrainingProgress

SMALL = ["--data", "digits", "--option", "depth=[1,1,1]", "--epochs", "2", "--batch-size", "256"]


def call(main, *arguments, capsys):
    status = main([str(argument) for argument in arguments])
    return status, " ".join(capsys.readouterr().out.split())


def records(out):
    return [json.loads(line) for line in (out / run.METRICS).read_text().splitlines()]


def test_train_and_evaluate(tmp_path, capsys):
    status, text = call(train.main, *SMALL, "--out", tmp_path, capsys=capsys)
    assert status == 0
    assert "rir18_thin" in text
    assert "1,437 + 360 images 1x8x8" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.safetensors", "model.safetensors", "metrics.jsonl", "run.json", "curves.png",
    }  # fmt: skip
    assert [line["epoch"] for line in records(tmp_path)] == [1, 2]
    accuracy = records(tmp_path)[-1]["test_accuracy"]
    for path in (tmp_path, tmp_path / run.WEIGHTS, tmp_path / run.CHECKPOINT):
        status, text = call(evaluate.main, path, "--json", capsys=capsys)
        assert status == 0
        assert json.loads(text)["test_accuracy"] == pytest.approx(accuracy)
    status, text = call(evaluate.main, tmp_path, capsys=capsys)
    assert f"rir18_thin: test accuracy {accuracy:.2f} %" in text
    assert "360 images" in text


def test_the_bars_move_within_an_epoch():
    counted = {"loss": torch.tensor(0.0), "right": torch.tensor(0.0)}
    state = SimpleNamespace(
        recipe=SimpleNamespace(epochs=3, batch_size=8), steps_per_epoch=4, epoch=1, step=2, part=(0, 8), counted=counted
    )
    record = dict.fromkeys(("train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds"), 0.0)

    def shown():
        return [(task.description, task.completed, task.total) for task in bars._bar.tasks]

    with TrainingProgress(state) as bars:  # a run that goes on in the middle of an epoch
        assert shown() == [("epoch 2/3", 2, 4), ("all", 6, 12)]
        state.step = 3
        bars.step(state)
        assert shown() == [("epoch 2/3", 3, 4), ("all", 7, 12)]
        state.step = 4
        bars.step(state)
        state.epoch, state.step = 2, 0
        bars.epoch(state, {"epoch": 2, **record})
        assert shown() == [("epoch 3/3", 0, 4), ("all", 8, 12)]


def test_a_run_is_never_overwritten_by_accident(tmp_path, capsys):
    assert call(train.main, *SMALL, "--out", tmp_path, capsys=capsys)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    status, text = call(train.main, *SMALL, "--out", tmp_path, capsys=capsys)
    assert status == 2
    assert "holds a run: --resume goes on with it, --overwrite removes it" in text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    status, text = call(train.main, "--resume", "--out", tmp_path, "--seed", 1, capsys=capsys)
    assert status == 2
    assert "the run was started with seed=0, not 1" in text
    assert call(train.main, "--resume", "--out", tmp_path, capsys=capsys)[0] == 0  # nothing is left to do
    assert (tmp_path / run.WEIGHTS).read_bytes() == before[run.WEIGHTS]
    assert call(train.main, *SMALL, "--seed", 1, "--overwrite", "--out", tmp_path, capsys=capsys)[0] == 0
    assert (tmp_path / run.WEIGHTS).read_bytes() != before[run.WEIGHTS]
    assert len(records(tmp_path)) == 2


def test_a_run_is_kept_until_the_new_one_can_begin(tmp_path, capsys):
    assert call(train.main, *SMALL, "--out", tmp_path, capsys=capsys)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for wrong in (["--graphs"], ["--impl", "hybrid", "--precision", "fp64"], ["--seed", -1]):
        arguments = [*SMALL, *wrong, "--overwrite", "--device", "cpu", "--out", tmp_path]
        status, text = call(train.main, *arguments, capsys=capsys)
        assert (status, text.startswith("error: ")) == (2, True)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_left_of_a_run_without_its_checkpoint(tmp_path, capsys):
    assert call(train.main, *SMALL, "--out", tmp_path, capsys=capsys)[0] == 0
    (tmp_path / run.CHECKPOINT).unlink()
    status, text = call(train.main, *SMALL, "--out", tmp_path, capsys=capsys)
    assert (status, "holds a run" in text) == (2, True)
    for how in ("--overwrite", "--resume"):
        (tmp_path / run.CHECKPOINT).unlink(missing_ok=True)
        status, text = call(train.main, *SMALL, "--epochs", 1, how, "--out", tmp_path, capsys=capsys)
        assert status == 0
        assert ("no checkpoint.safetensors to go on from: a new run begins" in text) == (how == "--resume")
        assert [line["epoch"] for line in records(tmp_path)] == [1]


def test_a_checkpoint_of_another_version(tmp_path, capsys):
    assert call(train.main, *SMALL, "--out", tmp_path, capsys=capsys)[0] == 0
    path = tmp_path / run.CHECKPOINT
    tensors, facts = run.checkpoint.load(path)
    for changed in ({"settings": facts["settings"] | {"colour": "red"}}, {"settings": None}):
        run.checkpoint.save(path, tensors, facts | changed)
        status, text = call(train.main, "--resume", "--out", tmp_path, capsys=capsys)
        assert (status, "the checkpoint's settings are not those of this version" in text) == (2, True)
        status, text = call(evaluate.main, path, capsys=capsys)
        assert (status, "the checkpoint's settings are not those of this version" in text) == (2, True)
    run.checkpoint.save(path, tensors, facts | {"data": {}})
    status, text = call(evaluate.main, path, capsys=capsys)
    assert (status, "does not say what its images were like (KeyError('mean'))" in text) == (2, True)


def test_a_folder_of_images_that_moves(tmp_path, capsys):
    """The run goes on where they are now, at the size that they were brought to."""
    generator = np.random.default_rng(0)
    for part, label, index in itertools.product(("train", "test"), ("a", "b"), range(4)):
        folder = tmp_path / "here" / part / label
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (9 + index, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    out = tmp_path / "out"
    given = ["--model", "rir18_thin", "--option", "depth=[1,1,1]", "--epochs", 2, "--batch-size", 4, "--device", "cpu"]
    given += ["--data", tmp_path / "here", "--image-size", 8, "--minutes", 1e-9, "--out", out]
    status, text = call(train.main, *given, capsys=capsys)
    assert (status, "--resume" in text) == (0, True)
    (tmp_path / "here").rename(tmp_path / "there")
    status, text = call(train.main, "--resume", "--data", tmp_path / "there", "--out", out, capsys=capsys)
    assert status == 0, text
    assert call(evaluate.main, out, "--data", tmp_path / "there", capsys=capsys)[0] == 0


def test_stopped_by_the_clock_and_continued(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(train.main, *SMALL, "--out", whole, capsys=capsys)[0] == 0
    status, text = call(train.main, *SMALL, "--minutes", 1e-9, "--out", parts, capsys=capsys)
    assert status == 0
    assert f"stopped; python -m models.train --resume --out {parts} goes on" in text.replace("/ ", "/")
    assert not (parts / run.WEIGHTS).exists()
    assert call(train.main, "--resume", "--out", parts, capsys=capsys)[0] == 0
    assert (parts / run.WEIGHTS).read_bytes() == (whole / run.WEIGHTS).read_bytes()


def test_ctrl_c_leaves_a_checkpoint(tmp_path, capsys, monkeypatch):
    update = run.Run._update

    def interrupted(self, *args):
        update(self, *args)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run.Run, "_update", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        status, text = call(train.main, *SMALL, "--out", tmp_path, capsys=capsys)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert "goes on" in text
    assert run.checkpoint.load_facts(tmp_path / run.CHECKPOINT)["position"] == {"epoch": 0, "step": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "error: nowhere does not exist"),
        (["--model", "rir18"], "error: rir18: no network is called 'rir18', did you mean"),
        (["--option", "depth"], "error: --option takes NAME=VALUE, got 'depth'"),
        (["--option", "colour=red"], "error: rir18_thin: RiR takes no option colour"),
        (["--recipe", "slow"], "error: recipe must be one of paper, fast, got 'slow'"),
        (["--epochs", "0"], "error: epochs must be in [1, 1000000), got 0"),
        (["--impl", "hybrid", "--precision", "fp64"], 'error: impl="hybrid" takes float16, bfloat16 and float32'),
        (["--batch-size", "2000"], "fewer than a batch of 2000"),
        (["--graphs"], "error: graphs are CUDA graphs, and this run is on cpu"),
    ],
)
def test_mistakes(arguments, message, tmp_path, capsys):
    status, text = call(train.main, *arguments, "--device", "cpu", "--out", tmp_path / "out", capsys=capsys)
    assert status == 2
    assert message in text
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(train.main, *SMALL, "--out", whole, capsys=capsys)[0] == 0
    with monkeypatch.context() as patch:
        flush, calls = os.fsync, []

        def full(handle):
            calls.append(handle)
            if len(calls) > 4:
                raise OSError(28, "No space left on device")
            flush(handle)

        patch.setattr(run.checkpoint.os, "fsync", full)
        status, text = call(train.main, *SMALL, "--checkpoint-every", 0, "--out", out, capsys=capsys)
    assert status == 2
    assert "could not be written (No space left on device); the checkpoint before it is kept: make room" in text
    assert call(train.main, "--resume", "--out", out, capsys=capsys)[0] == 0
    assert (out / run.WEIGHTS).read_bytes() == (whole / run.WEIGHTS).read_bytes()


def test_evaluating_what_is_no_run(tmp_path, capsys):
    status, text = call(evaluate.main, tmp_path, capsys=capsys)
    assert status == 2
    assert "neither model.safetensors nor checkpoint.safetensors is in it" in text
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    status, text = call(evaluate.main, tmp_path / "x.safetensors", capsys=capsys)
    assert status == 2
    assert "not a whole safetensors file" in text


def test_settings_that_were_not_given_have_defaults():
    found = settings.from_arguments({}, on_gpu=False)
    assert (found.data, found.model, found.recipe.epochs, found.precision) == ("digits", "rir18_thin", 60, "fp32")
    found = settings.from_arguments({"data": "folder"}, on_gpu=True)
    assert (found.model, found.recipe.epochs, found.recipe.batch_size) == ("rir18_wide", 82, 500)
    assert found.precision == "bf16"
    assert settings.from_arguments({"recipe": "fast", "ema": 0.5}, on_gpu=True).recipe.ema == 0.5
    again = settings.Settings.from_dict(json.loads(json.dumps(found.as_dict())))
    assert again == found
    assert settings.continued(found.as_dict(), {"data": "elsewhere", "seed": 0}).data == "elsewhere"
    with pytest.raises(SettingsError, match="started with epochs=82, not 3"):
        settings.continued(found.as_dict(), {"epochs": 3})
