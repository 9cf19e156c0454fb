"""Recipes: optimizer, learning rate, penalty, and for how long.

"paper" is that of Targ, Almeida and Lyman (arXiv 1603.08029): SGD with momentum 0.9, batches of 500, 82 epochs, a rate
of 0.1 that falls tenfold after epochs 42 and 62, and an L2 penalty of 1e-4. The penalty is on W - I where a layer has
an identity: the layers add theirs explicitly, so that W is what was learned beside it. "fast" is what has become usual
since: one cycle of the rate, Nesterov momentum, smoothed labels, no penalty on norms, and an average over the last
steps.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from .errors import SettingsError


def _steps(optimizer, recipe, steps):
    # the paper's epochs 42 and 62 of 82, as parts of however many there are
    milestones = [round(steps * 42 / 82), round(steps * 62 / 82)]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


def _one_cycle(optimizer, recipe, steps):
    total = steps + 1  # the scheduler is stepped after the last update too
    rising = max(0.25, 2 / total)  # a cycle of a few steps still has one on its way up
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=total, pct_start=rising, cycle_momentum=False
    )


SCHEDULES = {"steps": _steps, "one_cycle": _one_cycle}


@dataclass(frozen=True)
class Recipe:
    """learning_rate: the highest one. ema: the weights' part that is kept each step, or None for no average."""

    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str  # "steps" or "one_cycle"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    norm_decay: bool = True  # whether the penalty is on the norms' parameters, and on biases, too
    label_smoothing: float = 0.0
    ema: float | None = None

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise SettingsError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        for name, smallest, limit in _RANGES:
            value = getattr(self, name)
            if value is not None and not smallest <= value < limit:
                raise SettingsError(f"{name} must be in [{smallest}, {limit}), got {value}")


_RANGES = (
    ("epochs", 1, 1_000_000),
    ("batch_size", 1, 1_000_000),
    ("learning_rate", 0, 1000),
    ("momentum", 0, 1),
    ("weight_decay", 0, 1),
    ("label_smoothing", 0, 1),
    ("ema", 0, 1),
)

RECIPES = {
    "paper": Recipe(epochs=82, batch_size=500, learning_rate=0.1, schedule="steps"),
    "fast": Recipe(
        epochs=24,
        batch_size=512,
        learning_rate=0.4,
        schedule="one_cycle",
        nesterov=True,
        weight_decay=5e-4,
        norm_decay=False,
        label_smoothing=0.1,
        ema=0.99,
    ),
}


def recipe(name: str, **changes) -> Recipe:
    """The recipe of this name with some of its fields changed. SettingsError for unknown names and bad values."""
    if name not in RECIPES:
        raise SettingsError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return dataclasses.replace(RECIPES[name], **changes)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Two groups: what the penalty is on, and (where norm_decay is off) norms and biases, which have one axis."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    spared = [] if recipe.norm_decay else [p for p in parameters if p.dim() <= 1]
    spared_ids = set(map(id, spared))
    groups = [{"params": [p for p in parameters if id(p) not in spared_ids], "weight_decay": recipe.weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return torch.optim.SGD(groups, recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int):
    """A scheduler of torch's that is stepped after every update of the weights."""
    return SCHEDULES[recipe.schedule](optimizer, recipe, recipe.epochs * steps_per_epoch)
