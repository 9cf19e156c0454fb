"""A training run: the network, what changes it, and the loop over epochs and steps.

Every random number of the data is a function of the seed and the epoch (models.data.augment), so a place in the data is
two numbers, and a run that is continued from a checkpoint ends with the bits of one that never stopped.

The first step of each piece of a run is not timed: kernels are compiled in it.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F

import rir_kernels as rir
from models.data import augment
from rir_kernels.common.memory_format import to_format

from . import build, checkpoint, evaluation, report, state
from .average import Average
from .errors import SettingsError
from .log import append, write
from .ranks import Ranks
from .recipe import make_optimizer, make_schedule
from .settings import Settings

CHECKPOINT, WEIGHTS, METRICS = "checkpoint.safetensors", "model.safetensors", "metrics.jsonl"
_SMALL = 500  # values of an image
_ASK_RANKS = 20  # steps between two questions that all ranks have to answer


class Run:
    """One run in one folder. images: models.data.Images; ranks: who takes part, as `ranks.joined` says.

    SettingsError for what does not go together, before anything is written.
    """

    def __init__(self, settings: Settings, images, out: str | Path, *, device="cpu", ranks: Ranks | None = None):
        self.settings, self.recipe = settings, settings.recipe
        self.out, self.device, self.ranks = Path(out), torch.device(device), ranks or Ranks()
        if self.out.exists() and not self.out.is_dir():
            raise SettingsError(f"{self.out} is a file, and a run needs a folder: take another --out")
        self.part = self.ranks.part(self.recipe.batch_size)
        self.steps_per_epoch = len(images.train_y) // self.recipe.batch_size
        if self.steps_per_epoch == 0:
            raise SettingsError(
                f"{images.name} has {len(images.train_y)} images to train on: fewer than a batch of "
                f"{self.recipe.batch_size}; take a smaller batch_size"
            )
        self.data = images.fingerprint
        self.scale = build.scale({"data": self.data}, self.device)
        self.images = images.to(self.device)
        # oneDNN's gradient of a strided 1x1 writes past its workspace where channels_last images have few channels
        # (uxlfoundation/oneDNN#6035)
        self.channels_last = self.device.type != "cpu" or settings.options.get("shortcut") != "projection"
        self.padding, self.flip, self.jitter = 0, False, None
        if settings.augment:
            self.padding, self.flip, self.jitter = images.padding, images.flip, images.jitter
        self.description = build.describe(settings, images)

        if self.device.type == "cpu" and images.train_x[0].numel() < _SMALL:
            torch.set_num_threads(1)  # they would wait for each other more than they compute
        torch.backends.cudnn.benchmark = not settings.deterministic
        torch.manual_seed(settings.seed)
        self.model = build.network(self.description, impl=settings.impl, device=self.device).train()
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if self.ranks.world > 1:
            self.model = rir.convert_sync_batchnorm(self.model)
        self.average = None if self.recipe.ema is None else Average(self.model, self.recipe.ema)
        self.optimizer = make_optimizer(self.model, self.recipe)
        self.schedule = make_schedule(self.optimizer, self.recipe, self.steps_per_epoch)

        self._forward = None  # made when it is needed: see `prepare`
        self.epoch = self.step = 0  # finished epochs, and finished steps of the next one
        self.records = []  # of every finished epoch
        self.seconds = 0.0  # spent in training steps, of all parts of the run but for the first step of each
        self.counted = {  # in this epoch, on this rank
            "loss": torch.zeros((), dtype=torch.float64, device=self.device),
            "right": torch.zeros((), dtype=torch.float64, device=self.device),
        }

    @property
    def finished(self) -> bool:
        return self.epoch == self.recipe.epochs

    @property
    def evaluated(self):
        """The network that the test accuracy is of, and whose weights are kept."""
        return self.model if self.average is None else self.average.model

    def resume(self) -> bool:
        """Continue from the folder's checkpoint; False where there is none. Lines of metrics.jsonl after it go."""
        path = self.out / CHECKPOINT
        if not path.exists():
            return False
        state.restore(self, path)
        if self.ranks.first:
            write(self.out / METRICS, self.records)
        return True

    def prepare(self) -> None:
        """Makes what computes the scores in training: the network itself, compiled, or as graphs.

        SettingsError where that cannot be; nothing has been written by then.
        """
        self._forward = self._graphed() if self.settings.graphs else self.model
        if self.settings.compile and self.ranks.world == 1:
            self._forward = torch.compile(self.model)

    def save(self) -> None:
        """Within an epoch all ranks have to call it at the same step."""
        tensors, facts = state.gather(self)
        if self.ranks.first:
            checkpoint.save(self.out / CHECKPOINT, tensors, facts)

    def _save_weights(self):
        if self.ranks.first:
            facts = {"model": self.description, "settings": self.settings.as_dict(), "data": self.data}
            checkpoint.save(self.out / WEIGHTS, build.sectioned("model", self.evaluated.state_dict()), facts)

    def train(self, *, save_every: float = 30.0, stop=lambda: False, progress=None) -> bool:
        """Epochs until all are done (True), or until stop() says so between two steps (False); both end with a save.

        save_every: seconds between checkpoints, which fall between two steps; 0 has one after every step. progress: a
        Progress, which is told of every step and every epoch.
        """
        if self._forward is None:
            self.prepare()
        if self.finished:
            if not (self.out / WEIGHTS).exists():  # it ended between its last two files
                self._save_weights()
            return True
        alone = self._forward
        try:
            if self.ranks.world > 1:
                self._forward = self._on_all_ranks()
            return self._train(save_every, stop, progress)
        finally:
            self._forward = alone  # DDP must not outlive the process group

    def _train(self, save_every, stop, progress):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if (self.epoch, self.step) == (0, 0):
            for path in left_in(self.out) if self.ranks.first else ():
                path.unlink()  # an earlier run's
            self.save()  # from here on the folder alone says how to continue
        saved, started = time.monotonic(), None
        while not self.finished:
            plan = augment.plan_epoch(
                len(self.images.train_y),
                seed=self.settings.seed,
                epoch=self.epoch,
                padding=self.padding,
                flip=self.flip,
                jitter=self.jitter,
            ).to(self.device)
            started = started and time.monotonic()
            while self.step < self.steps_per_epoch:
                self._update(plan)
                self.step += 1
                if started is None:
                    self._wait()
                    started = time.monotonic()
                if progress:
                    progress.step(self)
                if self.step == self.steps_per_epoch:
                    break
                stopped, due = self._agreed(stop(), time.monotonic() - saved >= save_every)
                if stopped or due:
                    self._add_time(started)
                    self.save()
                    saved = started = time.monotonic()
                if stopped:
                    return False
            self._add_time(started)
            record = self._end_epoch()
            if progress:
                progress.epoch(self, record)
            (stopped,) = self._agreed(stop())
            if self.finished or stopped or time.monotonic() - saved >= save_every:
                self.save()
                saved = time.monotonic()
            if stopped and not self.finished:
                return False
        self._save_weights()
        return True

    def _graphed(self):
        if self.ranks.world > 1:
            raise SettingsError("graphs are for one device: their capture cannot hold the ranks' collectives")
        if self.device.type != "cuda":
            raise SettingsError(f"graphs are CUDA graphs, and this run is on {self.device}")
        shape = (self.recipe.batch_size, *self.images.train_x.shape[1:])
        x = to_format(torch.zeros(shape, device=self.device), self.channels_last)
        # a graph holds no casts of weights that autocast made outside it
        cast = torch.autocast("cuda", torch.bfloat16, enabled=self.settings.precision == "bf16", cache_enabled=False)
        with rir.preserved_statistics(self.model), cast:
            return torch.cuda.make_graphed_callables(self.model, (x,))

    def _on_all_ranks(self):
        devices = [self.device] if self.device.type == "cuda" else None
        model = torch.nn.parallel.DistributedDataParallel(self.model, device_ids=devices)
        return torch.compile(model) if self.settings.compile else model

    def _update(self, plan):
        first = self.step * self.recipe.batch_size
        start, stop = first + self.part[0], first + self.part[1]
        x, y = augment.batch(self.images.train_x, self.images.train_y, plan, start, stop, padding=self.padding)
        scores = evaluation.forward(
            self._forward, x, self.scale, self.settings.precision, channels_last=self.channels_last
        )
        loss = F.cross_entropy(scores, y, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model, self.epoch * self.steps_per_epoch + self.step)
        with torch.no_grad():  # on the device: nothing here waits for it
            self.counted["loss"] += loss * len(y)
            self.counted["right"] += (scores.argmax(1) == y).sum()

    def _end_epoch(self):
        """Evaluates, writes the line of this epoch, and starts the next one."""
        seen = self.steps_per_epoch * self.recipe.batch_size
        self.ranks.share_buffers(self.evaluated)  # bounds of quantized activations are each rank's own
        score = evaluation.evaluate(
            self.evaluated, self.images, self.scale, precision=self.settings.precision, ranks=self.ranks
        )
        record = {
            "epoch": self.epoch + 1,
            "step": (self.epoch + 1) * self.steps_per_epoch,
            "learning_rate": self.schedule.get_last_lr()[0],
            "train_loss": self.ranks.sum(self.counted["loss"]).item() / seen,
            "train_accuracy": 100 * self.ranks.sum(self.counted["right"]).item() / seen,
            "test_loss": score.loss,
            "test_accuracy": score.accuracy,
            "seconds": round(self.seconds, 3),
        }
        self.records.append(record)
        if self.ranks.first:
            append(self.out / METRICS, record)
        self.epoch, self.step = self.epoch + 1, 0
        for count in self.counted.values():
            count.zero_()
        return record

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _add_time(self, started):
        self._wait()
        self.seconds += time.monotonic() - started

    def _agreed(self, *flags):
        """Each of the flags where it is set on some rank; with several ranks they are asked every few steps."""
        if self.ranks.world > 1 and self.step % _ASK_RANKS:
            return [False] * len(flags)
        return self.ranks.any(flags, self.device)


def left_in(folder: Path) -> list[Path]:
    """The files of a run that are in the folder."""
    names = (CHECKPOINT, WEIGHTS, METRICS, report.RUN, report.CURVES)
    return [folder / name for name in names if (folder / name).exists()]
