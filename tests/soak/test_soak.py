"""The soak finds what it is there to find: each fault here is one that a long run must not pass over."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch

from models.training import checkpoint

from . import command, life, resources
from .__main__ import main

CPU = torch.device("cpu")


def ignore(event, **facts):
    pass


def a_life(seed=0, events=40):
    life.live(random.Random(seed), ignore, device="cpu", impl="torch", events=events)


@pytest.mark.long
def test_a_life_without_a_fault():
    a_life()  # what the lives below would be without their faults


def moved_by(change):
    """A function that does what the one given does and changes the network beside it."""

    def wrap(function):
        def faulty(model, *args, **kwargs):
            result = function(model, *args, **kwargs)
            with torch.no_grad():
                change(model)
            return result

        return faulty

    return wrap


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.fc.weight.add_(1e-6),
        lambda model: next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_mean.add_(1e-6),
        lambda model: setattr(model.fc, "weight", torch.nn.Parameter(model.fc.weight.clone())),
    ],
    ids=["weight", "statistics", "identity"],
)
@pytest.mark.parametrize("name", ["fuse_", "unfuse_"])
def test_surgery_that_changes_a_network(name, change, monkeypatch):
    monkeypatch.setattr(life, name, moved_by(change)(getattr(life, name)))
    with pytest.raises(AssertionError):
        a_life()


def a_little_more(model, args, scores):
    return scores * 1.001


def test_a_fused_network_that_computes_something_else(monkeypatch):
    def faulty(model, **options):
        report = fuse(model, **options)
        model.register_forward_hook(a_little_more)
        return report

    fuse = life.fuse_
    monkeypatch.setattr(life, "fuse_", faulty)
    with pytest.raises(AssertionError):
        a_life()


def test_a_refused_call_that_leaves_something_behind(monkeypatch):
    def faulty(self, x):
        self.fc.bias.data.add_(1e-6)
        return forward(self, x)

    forward = life.ResNet.forward
    monkeypatch.setattr(life.ResNet, "forward", faulty)
    with pytest.raises(AssertionError, match="has changed"):
        a_life()


def test_memory_that_grows_is_a_fault():
    """In another process: this one may give back what earlier tests held, and grow less."""
    code = """
import torch
from tests.soak import resources
watch, kept = resources.Watch(torch.device("cpu")), []
for _ in range(2 * resources.WARM):
    kept.append(torch.ones(int(resources.GROWTH_MIB) << 18))  # of 4 bytes
    watch.check()
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=command.ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "MiB more than after round" in ended.stderr, ended.stderr


def test_a_file_left_open_is_a_fault(tmp_path):
    watch, kept = resources.Watch(CPU), []
    with pytest.raises(AssertionError, match="open files"):
        for number in range(resources.WARM + 1):
            kept.append(os.open(tmp_path / str(number), os.O_CREAT))
            watch.check()
    for file in kept:
        os.close(file)


def test_a_fault_ends_the_command_with_its_repetition(tmp_path, monkeypatch, capsys):
    def faulty(*args, **kwargs):
        raise AssertionError("two rounds in, the bits differ")

    monkeypatch.setattr(command, "live", faulty)
    assert main(["--minutes", "0", "--seed", "3", "--round", "2", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "again: python -m tests.soak --seed 3 --round 2 --device cpu --impl auto" in capsys.readouterr().out
    *_, last = (json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines())
    assert last["event"] == "fault" and "the bits differ" in last["error"]


@pytest.mark.long
@pytest.mark.interpreter  # a GPU has `make soak` itself
def test_one_round(tmp_path, capsys):
    assert main(["--minutes", "0", "--seed", "5", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "no fault" in capsys.readouterr().out


@pytest.mark.long
def test_a_checkpoint_that_does_not_hold_everything(tmp_path, monkeypatch):
    """Momentum left out of what is continued: the weights must come out as others, and that must be seen."""
    train = command._train

    def faulty(out, *arguments):
        if "--resume" in arguments:
            tensors, facts = checkpoint.load(out / command.CHECKPOINT)
            forgotten = {name: tensor.zero_() for name, tensor in tensors.items() if name.startswith("optimizer.")}
            checkpoint.save(out / command.CHECKPOINT, tensors | forgotten, facts)
        return train(out, *arguments)

    monkeypatch.setattr(command, "_train", faulty)
    with pytest.raises(AssertionError, match="other weights"):
        for seed in range(5):  # a run that ended before its disturbance continues nothing
            folder = tmp_path / str(seed)
            folder.mkdir()
            command.live(random.Random(seed), folder, ignore, device="cpu", impl="torch")
