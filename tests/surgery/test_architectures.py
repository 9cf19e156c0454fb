"""fuse_ preserves networks of torchvision, timm and pytorchcv; the tests run a few of them, with --long all.

The checks and the tolerance are in bench.tools.architectures.check.
"""

import json
import warnings

import pytest

from bench import cli
from bench.tools.architectures.check import check, seed
from bench.tools.architectures.zoo import ZOO
from rir_kernels.surgery import fuse_

BY_ID = {architecture.id: architecture for architecture in ZOO}
FAST = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "timm/regnety_004",
    "timm/convnext_atto",
    "pytorchcv/resnet20_cifar10",
    "pytorchcv/preresnet20_cifar10",
    "pytorchcv/seresnet20_cifar10",
    "pytorchcv/shakedropresnet20_cifar10",
)
COUNTS = {
    "torchvision/resnet18": {"conv_bn_act": 9, "conv_bn": 3, "conv_bn_add_act": 8},
    "torchvision/resnet50": {"conv_bn_act": 33, "conv_bn": 4, "conv_bn_add_act": 16},
    "timm/resnet50d": {"conv_bn_act": 35, "conv_bn": 4, "conv_bn_add_act": 16},
    "timm/resnetv2_50": {"conv_bn_act": 32, "bn_act": 17},
    "pytorchcv/resnet20_cifar10": {"conv_bn_act": 10, "conv_bn": 2, "conv_bn_add_act": 9},
    "pytorchcv/preresnet20_cifar10": {"conv_bn_act": 9, "bn_act": 10},
}


@pytest.fixture(autouse=True)
def quiet():
    """Ignores the libraries' warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _slow(name):
    return pytest.param(name, marks=() if name in FAST else pytest.mark.long)


@pytest.mark.parametrize("name", [_slow(name) for name in BY_ID])
def test_same_network(name):
    record = check(BY_ID[name])
    if record is None:
        pytest.skip(f"{BY_ID[name].library} does not import here")
    assert not record.defects
    assert record.report_lines < 25, "too long to be read"


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    seed()
    model = BY_ID[name].make()
    if model is None:
        pytest.skip(f"{BY_ID[name].library} does not import here")
    found = [item.pattern for item in fuse_(model, dry_run=True).replaced]
    assert {pattern: found.count(pattern) for pattern in sorted(set(found))} == COUNTS[name]


def test_command(tmp_path, capsys):
    if BY_ID["pytorchcv/nin_cifar10"].make() is None:
        pytest.skip("pytorchcv does not import here")
    assert cli.main(["architectures", "--only", "nin_cifar10", "--out", str(tmp_path)]) == 0
    assert "nothing to fuse" in capsys.readouterr().out
    data = json.loads((tmp_path / "architectures.json").read_text())
    assert [record["id"] for record in data["networks"]] == ["pytorchcv/nin_cifar10"] and "torch" in data["versions"]
    assert "| pytorchcv/nin_cifar10 |" in (tmp_path / "architectures.md").read_text()
    with pytest.raises(SystemExit):
        cli.main(["architectures", "--only", "nowhere", "--out", str(tmp_path)])
