"""Zeroing a stream: what it does to the output, and what is left of the accuracy."""

import json

import pytest
import torch

import rir_kernels as rir
from models import create
from models.studies import ablation
from models.training import evaluation
from models.training.errors import SettingsError
from tests.models.training.small import images, start


@pytest.mark.parametrize("package", [rir, rir.reference], ids=["packed", "naive"])
@pytest.mark.parametrize("stream", ablation.STREAMS)
def test_one_stream_of_one_layer_becomes_zero(package, stream):
    torch.manual_seed(0)
    layer = package.RiRLayer(6, 8, residual_fraction=0.25).eval()
    x = torch.randn(2, 6, 5, 5)
    whole = layer(x)
    with ablation.without(layer, stream):
        packed, (r, t) = layer(x), layer(x[:, :2], x[:, 2:])
    expected = whole.clone()
    expected[:, slice(None, 2) if stream == "residual" else slice(2, None)] = 0
    for found in (packed, torch.cat((r, t), 1)):
        # the two ways in may round otherwise; a wrong channel is 0 or far away
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), whole)


def test_accuracies_are_those_of_a_network_whose_weights_are_zeroed(tmp_path):
    """Where a channel's norm has weight and bias 0, the channel is zero: the same ablation, made otherwise."""
    run = start(tmp_path)
    run.train()
    model = run.evaluated.eval()
    results = ablation.ablate(model, images(), run.scale)
    assert results["test_accuracy"] == run.records[-1]["test_accuracy"]
    assert len(results["rows"]) == 6  # three blocks of two layers
    for row in results["rows"]:
        layer = model.get_submodule(row["layer"])
        for stream, part in zip(
            ablation.STREAMS, (slice(None, layer.out_residual), slice(layer.out_residual, None)), strict=True
        ):
            kept = [p.detach().clone() for p in (layer.bn.weight, layer.bn.bias)]
            with torch.no_grad():
                layer.bn.weight[part] = 0
                layer.bn.bias[part] = 0
                assert row[stream] == evaluation.evaluate(model, images(), run.scale).accuracy
                layer.bn.weight.copy_(kept[0])
                layer.bn.bias.copy_(kept[1])
    assert len({row["residual"] for row in results["rows"]}) > 1


def test_the_command(tmp_path, capsys):
    run = start(tmp_path / "run", epochs=1)
    run.train()
    assert ablation.main([str(tmp_path / "run"), "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert results["images"] == 360
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "stages.0.0.layers.0" in capsys.readouterr().out
    assert ablation.main([str(tmp_path / "nothing")]) == 2
    assert "there is no such file" in capsys.readouterr().out


def test_networks_of_one_stream_are_refused():
    with pytest.raises(SettingsError, match="no layers of two streams"):
        ablation.layers(create("cnn18_thin"))
