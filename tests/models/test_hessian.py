"""The Hessian at zero of linear networks with shortcuts around 1, 2 and 3 layers."""

import json
import math

import pytest
import torch

from models.studies import hessian as study


@pytest.fixture(scope="module")
def results():
    return study.run()


def of_depth(results, depth):
    rows = [row for row in results["rows"] if row["shortcut_depth"] == depth]
    assert [row["blocks"] for row in rows] == [1, 2, 4]
    return rows


def test_depth_2_has_the_same_condition_at_every_depth(results):
    x, target = study.samples()
    values = torch.linalg.svdvals((x @ x.T - target @ x.T) / x.shape[1])
    theory = (values[0] / values[-1]).item()
    assert results["theory_at_depth_2"] == pytest.approx(theory, rel=1e-12)
    for row in of_depth(results, 2):
        # sums of 1000 products in fp64, and the condition number of 56 enlarges their error
        assert row["condition_number"] == pytest.approx(theory, rel=1e-11)


def test_depth_1_grows(results):
    numbers = [row["condition_number"] for row in of_depth(results, 1)]
    x, _ = study.samples()
    values = torch.linalg.svdvals(x @ x.T)
    assert numbers[0] == pytest.approx((values[0] / values[-1]).item(), rel=1e-11)  # one block is linear regression
    assert numbers[2] > 2 * numbers[1] > 4 * numbers[0]  # measured: 1.1, 118, 287


def test_depth_3_is_exactly_zero(results):
    for row in of_depth(results, 3):
        assert row["largest_entry"] == 0
        assert math.isnan(row["condition_number"])


@pytest.mark.parametrize(("blocks", "depth"), [(2, 1), (1, 2), (2, 2), (1, 3)])
def test_the_hessian_by_finite_differences(blocks, depth):
    """Second differences of the loss itself, at weights that are not zero."""
    x, target = study.samples(count=5, channels=2)
    generator = torch.Generator().manual_seed(1)
    at = 0.5 * torch.randn(blocks, depth, 2, 2, generator=generator, dtype=torch.float64)
    step, count = 1e-4, at.numel()
    directions = step * torch.eye(count, dtype=torch.float64).reshape(count, *at.shape)
    found = torch.empty(count, count, dtype=torch.float64)
    for i, a in enumerate(directions):
        for j, b in enumerate(directions):
            corners = [study.loss(at + p * a + q * b, x, target) * p * q for p in (1, -1) for q in (1, -1)]
            found[i, j] = sum(corners) / (4 * step**2)
    expected = study.hessian(at, x, target)
    # a loss near 10 rounds to 1e-15, divided by 4e-8: 1e-7; the truncation is of the order of the step's square
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_condition_number():
    assert study.condition_number(torch.diag(torch.tensor([-8.0, 2.0]))) == 4
    assert study.condition_number(torch.diag(torch.tensor([1.0, 0.0]))) == math.inf
    assert math.isnan(study.condition_number(torch.zeros(2, 2)))


def test_the_command(monkeypatch, tmp_path, capsys, results):
    monkeypatch.setattr(study, "run", lambda: results)
    study.main(["--out", str(tmp_path / "deep" / "er")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["3", "H", "=", "0", "H", "=", "0", "H", "=", "0"] in lines
    assert ["2", *[f"{results['theory_at_depth_2']:.4g}"] * 3] in lines

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    written = json.loads((tmp_path / "deep" / "er" / "hessian.json").read_text(), parse_constant=refuse)
    assert [row["condition_number"] for row in of_depth(written, 3)] == [None] * 3
    assert of_depth(written, 1) == of_depth(results, 1)
    assert (tmp_path / "deep" / "er" / "hessian.png").read_bytes().startswith(b"\x89PNG")
