"""Two ranks train what one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models.training import build, checkpoint, evaluation, run
from models.training.errors import SettingsError
from models.training.ranks import Ranks
from tests.models.training.small import assert_same_bits, images, start, weights
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("distributed")
ROOT = Path(__file__).resolve().parents[3]


def train_on_this_rank(out, changes):
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    found = start(out, ranks=ranks, **changes)
    found.train(save_every=0)
    return weights(found), found.records


def train_both(folder, **changes):
    """(the run of one process, weights and records of the first of two ranks); the ranks agree bit by bit."""
    one = start(folder / "one", **changes)
    one.train()
    results = run_on_ranks(2, train_on_this_rank, folder / "two", changes, folder=folder / "ranks")
    (first, records), (second, _) = results
    assert_same_bits(first, second)
    return one, first, records


def test_two_ranks_are_one(tmp_path):
    one, found, records = train_both(tmp_path, precision="fp64", epochs=1)
    for name, tensor in weights(one).items():
        # fp64: the sums of a batch in two parts round otherwise, and three steps enlarge that some thousand times
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert records[0][name] == pytest.approx(one.records[0][name], rel=1e-10)
    stored, _ = checkpoint.load(tmp_path / "two" / run.CHECKPOINT)
    model = {name: tensor for name, tensor in found.items() if name.startswith("model.")}
    assert_same_bits({name: stored[name] for name in model}, model)


def stop_and_go_on(out, changes):
    """Metrics and weights of a run that stops within an epoch and is continued."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    run._ASK_RANKS = 1
    stops = iter((False, True))
    assert not start(out, ranks=ranks, **changes).train(stop=lambda: next(stops))
    dist.barrier()  # the first rank has written by now
    found = start(out, ranks=ranks, **changes)
    assert found.resume()
    found.train()
    return found.records


def test_two_ranks_that_stop_and_go_on_count_on(tmp_path):
    """What all ranks have counted of an epoch is in the checkpoint, once."""
    changes = {"epochs": 1, "precision": "fp64"}
    whole = run_on_ranks(2, train_on_this_rank, tmp_path / "whole", changes, folder=tmp_path / "ranks")[0][1]
    parts = run_on_ranks(2, stop_and_go_on, tmp_path / "parts", changes, folder=tmp_path / "again")[0]
    for name, value in whole[0].items():
        if name != "seconds":
            assert parts[0][name] == pytest.approx(value, rel=1e-12), name


def test_two_ranks_evaluate_the_network_that_is_kept(tmp_path):
    """Bounds of quantized activations are each rank's own: the first rank's are evaluated, and kept."""
    changes = {"epochs": 1, "quantize": "W4A4", "ema": None, "schedule": "steps", "learning_rate": 0.01}
    records = run_on_ranks(2, train_on_this_rank, tmp_path / "two", changes, folder=tmp_path / "ranks")[0][1]
    model, facts = build.load(tmp_path / "two" / run.WEIGHTS)
    score = evaluation.evaluate(model, images(), build.scale(facts, "cpu"))
    assert score.accuracy == pytest.approx(records[0]["test_accuracy"])
    assert score.loss == pytest.approx(records[0]["test_loss"], rel=1e-6)


def test_two_ranks_keep_to_the_error_budget_in_fp32(tmp_path):
    """One step: after it rounding errors are no longer what rounding made of them."""
    changes = {"epochs": 1, "batch_size": 96}
    golden = start(tmp_path / "golden", precision="fp64", **changes)
    start_of_fp32 = start(tmp_path / "other", **changes)
    golden.model.load_state_dict(start_of_fp32.model.state_dict())
    golden.train()
    one, found, _ = train_both(tmp_path, **changes)

    def flat(tensors):
        return torch.cat([t.double().flatten() for name, t in tensors.items() if name.startswith("model.")])

    exact, ours, plain = flat(weights(golden)), flat(found), flat(weights(one))
    allowed = 2 * (plain - exact).norm() + 2 * torch.finfo(torch.float32).eps * exact.norm()
    assert (ours - exact).norm() <= allowed


def test_ranks_that_do_not_divide_the_batch():
    assert [Ranks(rank, 4).part(32) for rank in range(4)] == [(0, 8), (8, 16), (16, 24), (24, 32)]
    with pytest.raises(
        SettingsError, match="a batch of 32 images cannot be shared by 3 ranks: take a multiple of that"
    ):
        Ranks(0, 3).part(32)


@pytest.mark.long
def test_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "models.train"]
    arguments = [
        "--option",
        "depth=[1,1,1]",
        "--epochs",
        "2",
        "--batch-size",
        "256",
        "--device",
        "cpu",
        "--out",
        tmp_path,
    ]
    subprocess.run([*command, *map(str, arguments)], cwd=ROOT, check=True, timeout=300)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["ranks"] == 2
    assert facts["result"]["finished"]
    assert len((tmp_path / run.METRICS).read_text().splitlines()) == 2
    assert subprocess.run([*command, "--epochs", "0"], cwd=ROOT, stderr=subprocess.DEVNULL, timeout=300).returncode != 0
