"""Rates, penalties and updates: against the paper's numbers and the formulas written out."""

import math

import pytest
import torch
from torch import nn

from models.training.errors import SettingsError
from models.training.recipe import RECIPES, make_optimizer, make_schedule, recipe


def rates(recipe, steps_per_epoch):
    """The rate of every step."""
    optimizer = make_optimizer(nn.Linear(2, 2), recipe)
    schedule = make_schedule(optimizer, recipe, steps_per_epoch)
    found = []
    for _ in range(recipe.epochs * steps_per_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_papers_rate():
    found = rates(recipe("paper"), 100)
    assert len(found) == 8200
    # exact but for the products' last bits
    assert found == pytest.approx([0.1] * 4200 + [0.01] * 2000 + [0.001] * 2000, rel=1e-12)


def test_the_papers_rate_in_fewer_epochs():
    assert rates(recipe("paper", epochs=41), 2) == pytest.approx([0.1] * 42 + [0.01] * 20 + [0.001] * 20, rel=1e-12)


def test_one_cycle():
    found = rates(recipe("fast", epochs=10, learning_rate=0.4), 10)
    peak = found.index(max(found))
    assert found[0] == pytest.approx(0.4 / 25)  # where torch's cycle begins
    assert max(found) == pytest.approx(0.4, rel=1e-3)  # between two steps
    assert peak in (24, 25)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert found[-1] < 0.4 / 100


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_a_cycle_of_a_few_steps(steps):
    found = rates(recipe("fast", epochs=1), steps)
    assert len(found) == steps
    assert all(0 < rate <= 0.4 for rate in found)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("norm_decay", [False, True])
def test_an_update_is_the_formula(nesterov, norm_decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3)).double()
    nn.init.normal_(model[1].weight)
    chosen = recipe("paper", nesterov=nesterov, norm_decay=norm_decay, weight_decay=0.01, learning_rate=0.3)
    optimizer = make_optimizer(model, chosen)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    for _ in range(3):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            decay = 0.01 if norm_decay or name == "0.weight" else 0.0
            gradient = p.grad + decay * expected[name]
            velocity[name] = 0.9 * velocity[name] + gradient
            expected[name] = expected[name] - 0.3 * (gradient + 0.9 * velocity[name] if nesterov else velocity[name])
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-14, atol=1e-14)  # fp64, a dozen operations


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    (group,) = make_optimizer(model, recipe("paper")).param_groups
    assert group["params"] == [model.weight]


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_are_whole(name):
    assert recipe(name) is not None
    assert all(math.isfinite(rate) and rate > 0 for rate in rates(recipe(name, epochs=3), 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"epochs must be in \[1, 1000000\), got 0"),
        ({"batch_size": -1}, "batch_size must be in"),
        ({"learning_rate": float("nan")}, "learning_rate must be in"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"ema": 1.5}, "ema must be in"),
        ({"schedule": "cosine"}, "schedule must be one of steps, one_cycle, got 'cosine'"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(SettingsError, match=message):
        recipe("paper", **changes)


def test_unknown_recipe():
    with pytest.raises(SettingsError, match="recipe must be one of paper, fast, got 'slow'"):
        recipe("slow")
