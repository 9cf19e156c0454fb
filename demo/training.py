"""Train the naive network and the fused one from the same weights on the same batches, and judge how they differ.

Training is chaotic: a difference in the last bit of one number grows until, after some steps, it has changed which
ReLUs are open. So the two loss curves cannot stay equal, and no fixed tolerance for all steps means anything. What can
be asked is whether the fused network strays further than a rounding error does. The yardstick is a third network, the
control: the naive one again, its starting weights changed by one unit in the last place.
"""

import copy
import math
import statistics
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

LEARNING_RATE = 0.1
MARGIN = 4  # by how much the largest difference of two chaotic curves may exceed that of another two
ACCURACY_POINTS = 4.0  # that two short trainings may end apart, however many images they are tested on


@dataclass(frozen=True)
class Check:
    """A question that had to be answered with yes."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Curves:
    """What was recorded of each network, by its name: the loss and the seconds of every step."""

    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]

    def median_seconds(self, name: str) -> float:
        """Of one step; the first two are left out (allocation, lazy set-up)."""
        return statistics.median(self.seconds[name][2:] or self.seconds[name])

    def difference(self, a: str, b: str) -> list[float]:
        """At every step; infinite where a loss is not finite."""
        differences = (abs(x - y) for x, y in zip(self.losses[a], self.losses[b], strict=True))
        return [value if math.isfinite(value) else math.inf for value in differences]


def control_of(model, eps: float, seed: int):
    """A copy of `model` with every parameter multiplied by 1 + eps or 1 - eps, at random."""
    control = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in control.parameters():
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1
            parameter.mul_(1 + eps * sign.to(parameter.device))
    return control


def make_optimizer(model, steps: int):
    """SGD as in the paper (momentum 0.9, L2 1e-4), and a rate that falls to zero along a quarter of a cosine."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.cos(step / steps * math.pi / 2))


def train_step(model, optimizer, x, y, dtype=torch.float32) -> float:
    """One update of `model`; its loss before that. dtype: of the convolutions, by autocast."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        scores = model(x)
    loss = F.cross_entropy(scores.float(), y)
    loss.backward()
    optimizer.step()
    return loss.item()  # which waits for the device


def train(models: dict, images, *, steps: int, batch: int, seed: int, dtype=torch.float32, on_step=None) -> Curves:
    """Every model takes every batch in turn, in an order that alternates: what slows one step slows its neighbour.

    on_step(losses by name) is called after each step.
    """
    optimizers = {name: make_optimizer(model.train(), steps) for name, model in models.items()}
    losses = {name: [] for name in models}
    seconds = {name: [] for name in models}
    for step, (x, y) in enumerate(images.batches(batch, steps, seed)):
        for name in list(models)[:: 1 if step % 2 else -1]:
            optimizer, schedule = optimizers[name]
            start = time.perf_counter()
            losses[name].append(train_step(models[name], optimizer, x, y, dtype))
            seconds[name].append(time.perf_counter() - start)
            schedule.step()
        if on_step:
            on_step({name: curve[-1] for name, curve in losses.items()})
    return Curves(losses, seconds)


@torch.no_grad()
def accuracy(model, images, batch: int = 256) -> float:
    """Percent of the test part that `model`, in eval mode, gets right."""
    model.eval()
    pairs = zip(images.test_x.split(batch), images.test_y.split(batch), strict=True)
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in pairs)
    return 100 * right / len(images.test_y)


def judge(curves: Curves, accuracies: dict[str, float], eps: float, tested: int) -> list[Check]:
    """The questions put to networks named "naive", "fused" and "control".

    eps: of the dtype they computed in; tested: the number of images that accuracies are of.
    """
    drift, usual = curves.difference("naive", "fused"), curves.difference("naive", "control")
    first, allowed_first = drift[0], 16 * eps * curves.losses["naive"][0]
    largest, allowed = max(drift), MARGIN * max(usual) + allowed_first
    share = accuracies["naive"] / 100
    by_chance = 300 * math.sqrt(2 * share * (1 - share) / tested)  # three standard errors of a difference, in points
    apart, points = abs(accuracies["naive"] - accuracies["fused"]), max(ACCURACY_POINTS, by_chance)
    return [
        Check(
            "the first loss agrees to rounding",
            first <= allowed_first,
            f"difference {first:.1e}, allowed {allowed_first:.1e} (16 eps of the loss)",
        ),
        Check(
            "the loss curves stay as close as a rounding error lets them",
            largest <= allowed < math.inf,
            f"largest difference {largest:.1e}, the control's {max(usual):.1e}, of which {MARGIN} times are allowed",
        ),
        Check(
            "both networks learned the same",
            apart <= points,
            f"test accuracy {accuracies['naive']:.1f} % and {accuracies['fused']:.1f} %, allowed {points:.1f} points",
        ),
    ]


@torch.no_grad()
def check_unfuse(fused, naive, unfuse, x) -> Check:
    """Whether `fused`, unfused, is a plain network again: loaded into `naive`, its weights give the same bits."""
    naive.load_state_dict(fused.state_dict())
    before = (naive.eval()(x) - fused.eval()(x)).abs().max().item()
    unfuse(fused)
    classes = [(type(a), type(b)) for a, b in zip(naive.modules(), fused.modules(), strict=True)]
    identical = torch.equal(naive(x), fused(x)) and all(a is b for a, b in classes)
    return Check(
        "unfuse_ gives the plain network back",
        identical,
        f"its weights in a network never fused give {'the same' if identical else 'OTHER'} bits; fused, it was "
        f"{before:.1e} away",
    )


def summary(curves: Curves, accuracies: dict[str, float], checks: list[Check]) -> dict:
    """All of it in plain numbers, for the report."""
    return {
        "losses": curves.losses,
        "difference": {name: curves.difference("naive", name) for name in ("fused", "control")},
        "seconds_per_step": {name: curves.median_seconds(name) for name in curves.losses},
        "accuracy": accuracies,
        "checks": [asdict(check) for check in checks],
    }
