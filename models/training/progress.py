"""Progress of a training run: bars, and a line for each epoch."""

import time

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tooling.console import console, say

_EVERY = 0.5  # seconds between two looks at the loss: each waits for the device


class TrainingProgress:
    """Bars over the epoch's steps and over all, with loss, accuracy, images/s, time left; a line for every epoch."""

    def __init__(self, run):
        # 80 characters have to hold them
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")]
        columns += [TextColumn("left"), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=console, transient=True)
        self._epoch = self._bar.add_task(_number(run), total=run.steps_per_epoch, completed=run.step, text="")
        total, done = run.recipe.epochs * run.steps_per_epoch, run.epoch * run.steps_per_epoch + run.step
        self._all = self._bar.add_task("all", total=total, completed=done, text="")
        self._looked, self._since = 0.0, 0

    def __enter__(self):
        self._bar.start()
        self._looked = time.monotonic()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def step(self, run) -> None:
        self._since += run.recipe.batch_size
        self._bar.advance(self._epoch)
        self._bar.advance(self._all)
        now = time.monotonic()
        if now - self._looked < _EVERY:
            return
        # this rank's images alone: others are not waited for
        seen = run.step * (run.part[1] - run.part[0])
        loss, right = (run.counted[name].item() / seen for name in ("loss", "right"))
        now = time.monotonic()
        self._bar.update(self._epoch, text=f"loss {loss:.3f}  accuracy {100 * right:5.1f} %")
        self._bar.update(self._all, text=f"{self._since / (now - self._looked):,.0f} images/s")
        self._looked, self._since = now, 0

    def epoch(self, run, record: dict) -> None:
        say(
            f"epoch {record['epoch']:3}/{run.recipe.epochs}  train {record['train_loss']:.3f} "
            f"{record['train_accuracy']:5.1f} %  test {record['test_loss']:.3f} {record['test_accuracy']:6.2f} %  "
            f"{record['seconds']:,.0f} s"
        )
        self._bar.reset(self._epoch, description=_number(run))
        self._looked, self._since = time.monotonic(), 0


def _number(run):
    return f"epoch {min(run.epoch + 1, run.recipe.epochs)}/{run.recipe.epochs}"
