"""Networks by name: what each is, what it costs, and that the documentation says the same."""

import re
from pathlib import Path

import pytest
import torch

import models
from models import __main__ as command
from models.rir import THIN, WIDE
from models.zoo import cost
from rir_kernels import reference

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
VARIANTS = {"cnn18": "CNN", "resnet18": "ResNet", "resnet_init18": "ResNet Init", "rir18": "RiR"}


def test_names():
    assert models.list_models() == [f"{name}_{size}" for size in ("wide", "thin") for name in VARIANTS]
    models.list_models().clear()
    assert len(models.list_models()) == 8  # a list of one's own


@pytest.mark.parametrize("name", models.list_models())
def test_a_name_is_a_variant_and_a_width(name):
    variant, _, size = name.rpartition("_")
    model = models.create(name, 7, depth=(1, 1, 1), dtype=torch.float64, device="meta")
    assert model.variant == VARIANTS[variant]
    widths = tuple(stage[0].layers[-1].bn.num_features for stage in model.stages)
    assert widths == {"wide": WIDE, "thin": THIN}[size]
    assert model.head.bn.num_features == 7
    assert model.head.conv.weight.dtype == torch.float64


def test_a_width_replaces_the_names():
    model = models.create("rir18_thin", width=(4, 6, 8), depth=(1, 1, 1), device="meta")
    assert [stage[0].layers[-1].bn.num_features for stage in model.stages] == [4, 6, 8]


def test_the_default_is_ten_classes():
    assert models.create("rir18_thin", layers=reference)(torch.randn(1, 3, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rir18wide", {}, "no network is called 'rir18wide', did you mean 'rir18_wide'.*cnn18_wide, .*rir18_thin"),
        ("vgg", {}, "no network is called 'vgg'[.;:]? .*cnn18_wide"),
        (18, {}, "no network is called 18"),
        ("rir18_thin", {"outer_shortcut": True, "inner_shortcut": False}, "outer_shortcut, inner_shortcut is decided"),
    ],
)
def test_what_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **options)


@pytest.mark.parametrize(("size", "width", "parameters"), [("wide", WIDE, 9_469_940), ("thin", THIN, 265_060)])
@pytest.mark.parametrize("name", VARIANTS)
def test_cost(name, size, width, parameters):
    macs = 32**2 * 27 * width[0] + 8**2 * width[2] * 10  # stem and head
    channels = width[0]
    for side, stage_width, layers in zip((32, 16, 8), width, (4, 6, 6), strict=True):
        macs += side**2 * 9 * stage_width * (channels + (layers - 1) * stage_width)
        channels = stage_width
    found = cost(f"{name}_{size}")
    assert (found.parameters, found.macs) == (parameters, macs)


def test_cost_with_options():
    plain = cost("resnet_init18_wide")
    found = cost("resnet_init18_wide", 100, image_size=64, shortcut="projection")
    assert found.parameters == 9_527_720
    # four times the pixels, 90 more classes, and two projections on half of the channels
    added = 16**2 * 384 * 90 + 32**2 * 48 * 96 + 16**2 * 96 * 192
    assert found.macs == 4 * plain.macs + added


def test_the_table_in_the_documentation():
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([\d,]+) \| ([\d,]+) \|$", PAGE.read_text(), re.MULTILINE)
    found = {name: cost(name) for name in models.list_models()}
    assert rows == [(name, f"{c.parameters:,}", f"{c.macs:,}") for name, c in found.items()]


def test_the_command_prints_every_network(capsys):
    command.main(["--num-classes", "100", "--image-size", "16"])
    lines = capsys.readouterr().out.splitlines()
    expected = cost("resnet18_thin", 100, image_size=16)
    assert f"resnet18_thin {expected.parameters:,} {expected.macs:,}" in [" ".join(line.split()) for line in lines]
    assert [line.split()[0] for line in lines[1:9]] == models.list_models()
    with pytest.raises(SystemExit):
        command.main(["--image-size", "0"])
    assert "0 is not a positive number" in capsys.readouterr().err
