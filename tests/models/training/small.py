"""A network and a recipe that train in a second, on real images."""

import dataclasses
import functools

import torch

from models import data
from models.training.recipe import Recipe
from models.training.run import Run
from models.training.settings import Settings

RECIPE = Recipe(
    epochs=3, batch_size=32, learning_rate=0.1, schedule="one_cycle", nesterov=True, norm_decay=False, ema=0.9
)  # 3 steps an epoch


@functools.cache
def images(train=100, test=50):
    """Some of scikit-learn's digits, moved in every way that a run knows."""
    digits = data.load("digits", train_images=train, test_images=test)
    return dataclasses.replace(digits, padding=1, flip=True)


def settings(**changes) -> Settings:
    """Of `changes`, what belongs to the recipe goes there."""
    of_recipe = {field.name for field in dataclasses.fields(Recipe)}
    recipe = dataclasses.replace(RECIPE, **{k: v for k, v in changes.items() if k in of_recipe})
    rest = {k: v for k, v in changes.items() if k not in of_recipe}
    return Settings(
        **{"data": "digits", "model": "rir18_thin", "options": {"depth": [1, 1, 1]}, "recipe": recipe} | rest
    )


def start(out, *, ranks=None, device="cpu", **changes) -> Run:
    return Run(settings(**changes), images(), out, ranks=ranks, device=device)


def weights(run) -> dict:
    """All that a run has learned: of the network, its average and the optimizer."""
    found = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    if run.average is not None:
        found |= {f"average.{name}": tensor for name, tensor in run.average.model.state_dict().items()}
    for index, state in run.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same_bits(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
