"""Train a network of the paper: python -m models.train [--data digits|PATH] [--out DIR]

Everything is written to one folder: metrics.jsonl (a line an epoch, test_accuracy in percent), curves.png, run.json
(settings, versions, device, result), checkpoint.safetensors (to go on from), model.safetensors (the final weights). A
run that was stopped or killed goes on with --resume, and ends with the bits of one that was not. On several devices:

    torchrun --nproc-per-node N -m models.train ...
"""

import argparse
import ast
import contextlib
import os
from pathlib import Path

import torch

from models.data import load
from models.training import checkpoint, settings
from models.training.command import carry_out
from models.training.errors import COMMAND_ERRORS, SettingsError
from models.training.ranks import joined, leave
from models.training.run import CHECKPOINT, Run, left_in
from rir_kernels.common.arguments import IMPLS
from tooling.console import say, waiting

# all other arguments are settings: what decides the bits
_PLACE = ("out", "resume", "overwrite", "minutes", "checkpoint_every", "device")


def parser() -> argparse.ArgumentParser:
    """Settings that were not given are absent from the namespace."""
    found = argparse.ArgumentParser(prog="python -m models.train", description=__doc__.splitlines()[0])

    def setting(group, *flags, **options):
        group.add_argument(*flags, default=argparse.SUPPRESS, **options)

    what = found.add_argument_group("what is trained, on what")
    setting(what, "--data", metavar="PATH", help="digits (default), or CIFAR as parquet files or binary archive, or a "
            "folder of images")  # fmt: skip
    setting(
        what, "--model", metavar="NAME", help="`python -m models` lists them; rir18_thin for digits, else rir18_wide"
    )
    setting(what, "--option", action="append", metavar="NAME=VALUE", help="of models.create: shortcut=projection, ...")
    setting(what, "--quantize", metavar="W4A4", help="bits of weights and activations; 8 at both ends")
    setting(what, "--seed", type=int, metavar="N")
    setting(what, "--image-size", type=int, metavar="N", help="folders of images: pixels to bring each to")

    how = found.add_argument_group("the recipe, and what to change of it")
    setting(how, "--recipe", metavar="NAME", help="paper (default) or fast")
    setting(how, "--epochs", type=int, metavar="N")
    setting(how, "--batch-size", type=int, metavar="N", help="images of a step, over all devices")
    setting(how, "--lr", type=float, dest="learning_rate", metavar="X", help="the highest learning rate")
    setting(how, "--weight-decay", type=float, metavar="X")
    setting(how, "--norm-decay", action=argparse.BooleanOptionalAction, help="weight decay on norms and biases too")
    setting(how, "--label-smoothing", type=float, metavar="X")
    setting(how, "--ema", type=float, metavar="X", help="average the weights, keeping this part each step")
    setting(how, "--augment", action=argparse.BooleanOptionalAction, help="shifts, flips of photographs")

    where = found.add_argument_group("where and how it runs")
    where.add_argument("--out", metavar="DIR", help="default: out/train/MODEL-RECIPE-SEED")
    where.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    where.add_argument("--overwrite", action="store_true", help="remove the run in DIR first")
    where.add_argument("--minutes", type=float, metavar="N", help="stop after these; --resume goes on")
    where.add_argument("--checkpoint-every", type=float, default=30, metavar="S", help="seconds (default: 30)")
    where.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    setting(where, "--impl", choices=IMPLS, help="default: auto")
    setting(where, "--precision", choices=("fp32", "bf16", "fp64"), help="default: bf16 (autocast) on a GPU, else fp32")
    setting(where, "--compile", action="store_true", help="torch.compile")
    setting(where, "--graphs", action="store_true", help="CUDA graphs of forward and backward")
    setting(where, "--deterministic", action="store_true", help="torch.use_deterministic_algorithms")
    return found


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 where the run is finished or was stopped as asked, 130 after a signal, 2 for an error."""
    args = parser().parse_args(argv)
    try:
        with joined(args.device) as (ranks, device):
            with waiting("images and network") if ranks.first else contextlib.nullcontext():
                run = _set_up(args, ranks, device)
            stopped = carry_out(run, save_every=args.checkpoint_every, minutes=args.minutes)
            return 130 if stopped else 0
    except COMMAND_ERRORS as error:
        say(f"error: {error}")
        return 2


def _set_up(args, ranks, device):
    """The run that was asked for: a new one, or one to be continued. What the folder holds is left as it is."""
    given = _settings_of(args)
    chosen = settings.from_arguments(given, on_gpu=device.type == "cuda")
    out = Path(args.out or f"out/train/{chosen.model}-{chosen.recipe_name}-seed{chosen.seed}")
    if left_in(out) and not (args.resume or args.overwrite):
        raise SettingsError(
            f"{out} holds a run: --resume goes on with it, --overwrite removes it, --out is another place"
        )
    if args.resume and (out / CHECKPOINT).exists():
        chosen = settings.continued(checkpoint.load_facts(out / CHECKPOINT).get("settings"), given)
    if chosen.deterministic:
        _be_deterministic()
    run = Run(chosen, load(chosen.data, image_size=chosen.image_size), out, device=device, ranks=ranks)
    run.prepare()
    if args.resume and not run.resume() and ranks.first:
        say(f"{out} has no {CHECKPOINT} to go on from: a new run begins")
    return run


def _settings_of(args):
    """{name: value} of the settings that were given."""
    given = {name: value for name, value in vars(args).items() if name not in _PLACE}
    if "option" in given:
        given["options"] = dict(map(_option, given.pop("option")))
    return given


def _option(text):
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise SettingsError(f"--option takes NAME=VALUE, got {text!r}")
    with contextlib.suppress(ValueError, SyntaxError):  # a word is a string
        value = ast.literal_eval(value)
    return name, list(value) if isinstance(value, tuple) else value  # as JSON will give it back


def _be_deterministic():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for; cuBLAS has not started yet
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


if __name__ == "__main__":
    leave(main())
