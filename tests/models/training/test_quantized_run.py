"""Quantized training from the command line, and its network in integers."""

import json

import pytest
import torch

from models import evaluate
from models.quantized import integer
from models.training import build, evaluation, run
from models.training.errors import SettingsError
from tests.models.training.small import assert_same_bits, images, start, weights


def test_integers_have_the_logits_of_the_quantized_network(tmp_path, capsys):
    found = start(tmp_path, quantize="W4A4")
    assert found.train()
    model, facts = build.load(tmp_path / run.WEIGHTS)
    scale = build.scale(facts, "cpu")
    with torch.no_grad():
        logits = evaluation.forward(model, images().test_x, scale, "fp32")
        assert torch.equal(evaluation.forward(integer(model), images().test_x, scale, "fp32"), logits)
    scores = []
    for arguments in ([], ["--integer"]):
        assert evaluate.main([str(tmp_path), "--json", "--device", "cpu", *arguments]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[1]


def test_quantized_runs_go_on_with_the_same_bits(tmp_path):
    """The bounds of the activations are part of a checkpoint."""
    whole = start(tmp_path / "whole", quantize="W4A8", ema=None)
    whole.train()
    first = start(tmp_path / "parts", quantize="W4A8", ema=None)
    steps = iter([False, False, False, True])
    first.train(stop=lambda: next(steps))
    second = start(tmp_path / "parts", quantize="W4A8", ema=None)
    assert second.resume()
    assert second.train()
    assert_same_bits(weights(second), weights(whole))
    assert any("quantizer.bound" in name for name in weights(whole))


def test_what_is_not_quantized_has_no_integers(tmp_path, capsys):
    start(tmp_path, epochs=1).train()
    assert evaluate.main([str(tmp_path), "--integer", "--device", "cpu"]) == 2
    assert "has no quantized layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bits", "message"), [("W1A4", "W1A4|weight_bits"), ("W4A9", "activation_bits"), ("4", "as in W4A4")]
)
def test_bits_out_of_range(bits, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        start(tmp_path, quantize=bits)
