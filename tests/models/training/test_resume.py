"""A run that was killed and continued ends with the bits of one that was not."""

import json
import multiprocessing
import os
import signal

import pytest
import torch

from models.training import checkpoint, run
from models.training.errors import CheckpointError
from tests.models.training.small import assert_same_bits, start, weights

STEPS = 9  # 3 epochs of 3


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_step(count):
    """After so many updates of the weights."""
    update = run.Run._update

    def updating(self, *args):
        update(self, *args)
        if self.epoch * self.steps_per_epoch + self.step + 1 == count:
            kill_myself()

    run.Run._update = updating


def killed_while_writing(count, share):
    """In the middle of the checkpoint with this number: `share` of its bytes are in the new file then."""
    serialize, written = checkpoint.serialize, []

    def serializing(*args):
        content = serialize(*args)
        written.append(len(content))
        return content[: int(share * len(content))] if len(written) == count else content

    def flushing(handle, flush=os.fsync):
        flush(handle)
        if len(written) == count:
            kill_myself()

    checkpoint.serialize = serializing
    checkpoint.os.fsync = flushing


def train(out, fault, *arguments, **changes):
    fault(*arguments)
    start(out, **changes).train(save_every=0)


def trained_until_killed(out, fault, *arguments, **changes):
    """`train` in a process of its own, which has to die."""
    context = multiprocessing.get_context("fork")  # a new interpreter would import torch anew for every case
    process = context.Process(target=train, args=(out, fault, *arguments), kwargs=changes)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def continued(out, **changes):
    found = start(out, **changes)
    assert found.resume()
    assert found.train()
    return found


@pytest.fixture(
    scope="module", params=[{}, {"ema": None, "schedule": "steps", "nesterov": False}], ids=["fast", "paper"]
)
def uninterrupted(request, tmp_path_factory):
    """(what is changed of the settings, the finished run)"""
    found = start(tmp_path_factory.mktemp("whole"), **request.param)
    assert found.train()
    return request.param, found


def assert_as_uninterrupted(found, expected):
    assert_same_bits(weights(found), weights(expected))
    ours, theirs = (checkpoint.load(r.out / run.WEIGHTS)[0] for r in (found, expected))
    assert_same_bits(ours, theirs)
    lines = [[json.loads(line) for line in (r.out / run.METRICS).read_text().splitlines()] for r in (found, expected)]
    for line in lines[0] + lines[1]:
        del line["seconds"]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 3


@pytest.mark.parametrize("step", [1, 5, 9], ids=["the first step", "within an epoch", "the last step"])
def test_killed_after(step, uninterrupted, tmp_path):
    changes, expected = uninterrupted
    trained_until_killed(tmp_path, killed_at_step, step, **changes)
    assert_as_uninterrupted(continued(tmp_path, **changes), expected)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_killed_while_a_checkpoint_is_written(share, uninterrupted, tmp_path):
    changes, expected = uninterrupted
    trained_until_killed(tmp_path, killed_while_writing, 5, share, **changes)
    assert (tmp_path / f"{run.CHECKPOINT}.part").exists()
    assert_as_uninterrupted(continued(tmp_path, **changes), expected)
    assert not (tmp_path / f"{run.CHECKPOINT}.part").exists()


def test_killed_before_anything_was_written(tmp_path):
    trained_until_killed(tmp_path, killed_while_writing, 1, 0.5)
    assert not start(tmp_path).resume()


def test_stopped_again_and_again(uninterrupted, tmp_path):
    """A new process, as it were, for every step; and what other code draws at random does not matter."""
    changes, expected = uninterrupted
    for attempt in range(STEPS + 1):
        found = start(tmp_path, **changes)
        torch.rand(attempt)
        assert found.resume() == (attempt > 0)
        steps = iter((False, True))
        if found.train(stop=lambda steps=steps: next(steps)):
            break
    assert_as_uninterrupted(found, expected)


def test_killed_between_the_last_checkpoint_and_the_weights(uninterrupted, tmp_path, monkeypatch):
    changes, expected = uninterrupted
    found = start(tmp_path, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(found, "_save_weights", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            found.train()
    assert not (tmp_path / run.WEIGHTS).exists()
    assert_as_uninterrupted(continued(tmp_path, **changes), expected)


def test_a_checkpoint_without_momentum(tmp_path):
    found = start(tmp_path)
    steps = iter((False, True))
    found.train(stop=lambda: next(steps))
    path = tmp_path / run.CHECKPOINT
    tensors, facts = checkpoint.load(path)
    checkpoint.save(path, {name: t for name, t in tensors.items() if not name.startswith("optimizer.3.")}, facts)
    with pytest.raises(CheckpointError, match="is damaged: it has no momentum for 1 of "):
        start(tmp_path).resume()


def test_random_numbers_go_on_where_they_were(tmp_path):
    first = start(tmp_path)
    torch.rand(7)
    first.save()
    expected = torch.rand(5)
    assert start(tmp_path).resume()
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rir18_wide"}, r"another model: .* is torch.float32 \("),
        ({"options": {"depth": [1, 1, 2]}}, "another model: .*no stages.2.1"),
        ({"ema": None}, None),
    ],
)
def test_a_checkpoint_of_another_model(changes, message, tmp_path):
    start(tmp_path).save()
    found = start(tmp_path, **changes)
    before = weights(found)
    if message is None:  # an average that is not needed does no harm
        assert found.resume()
        return
    with pytest.raises(CheckpointError, match=message):
        found.resume()
    assert_same_bits(weights(found), before)
    assert (found.epoch, found.step, found.records) == (0, 0, [])


def without(name):
    return lambda facts: facts.pop(name)


DAMAGES = {
    "no place": (without("position"), "its position is missing"),
    "no records": (without("records"), "its records is missing"),
    "no groups": (without("groups"), "its groups is missing"),
    "no schedule": (without("schedule"), "its schedule is missing"),
    "a group less": (lambda facts: facts["groups"].pop(), "its groups is missing or damaged"),
    "a parameter less": (lambda facts: facts["groups"][0]["params"].pop(), "its groups"),
    "a rate that is a word": (lambda facts: facts["groups"][0].update(lr="fast"), "its groups"),
    "a schedule that is a number": (lambda facts: facts.update(schedule=3), "its schedule"),
    "beyond the end": (lambda facts: facts["position"].update(epoch=4), "step 0 of epoch 4 .* has 3 epochs of 3 steps"),
    "before the beginning": (lambda facts: facts["position"].update(step=-1), "step -1 of epoch 0"),
    "between two steps": (lambda facts: facts["position"].update(step=0.5), r"step 0\.5 of"),
    "a record too many": (lambda facts: facts["records"].append({}), "with 1 records"),
}


def assert_refused(folder, message, change):
    """What a run left is changed and continued: nothing of the new run changes."""
    start(folder).save()
    path = folder / run.CHECKPOINT
    tensors, facts = checkpoint.load(path)
    change(tensors, facts)
    checkpoint.save(path, tensors, facts)
    found = start(folder, seed=1)
    before, random = weights(found), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        found.resume()
    assert_same_bits(weights(found), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert (found.epoch, found.step, found.records) == (0, 0, [])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_says_something_impossible(damage, tmp_path):
    change, message = DAMAGES[damage]
    assert_refused(tmp_path, message, lambda tensors, facts: change(facts))


def test_a_checkpoint_without_random_numbers(tmp_path):
    assert_refused(tmp_path / "without", "no cpu", lambda tensors, facts: tensors.pop("random.cpu"))
    short = {"random.cpu": torch.zeros(7, dtype=torch.uint8)}
    assert_refused(tmp_path / "short", r"cpu is torch.uint8 \(7,\)", lambda tensors, facts: tensors.update(short))


def test_a_checkpoint_of_other_images(tmp_path):
    found = start(tmp_path)
    found.save()
    found.data = found.data | {"sha256": "0"}
    with pytest.raises(CheckpointError, match=r"was trained on .*digits"):
        found.resume()
