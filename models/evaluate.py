"""Evaluate a trained network: python -m models.evaluate DIR [--data digits|PATH] [--impl NAME]

DIR is the folder of a run, or a file: model.safetensors, or checkpoint.safetensors of a run that goes on. The images
are those that it was trained with, unless --data names others of the same kind and classes.
"""

import argparse
import json
import sys
from pathlib import Path

from models.training import build, evaluation
from models.training.errors import COMMAND_ERRORS, CheckpointError
from models.training.ranks import joined
from models.training.run import CHECKPOINT, WEIGHTS
from rir_kernels.common.arguments import IMPLS
from tooling.console import say


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m models.evaluate", description=__doc__.splitlines()[0])
    found.add_argument("run", metavar="DIR", help="folder of a run, or one of its safetensors files")
    found.add_argument("--data", metavar="PATH", help="default: where the run had its images from")
    found.add_argument("--image-size", type=int, metavar="N", help="folders of images: pixels to bring each to")
    found.add_argument("--impl", default="auto", choices=IMPLS)
    found.add_argument("--precision", choices=("fp32", "bf16", "fp64"), help="default: that of the run")
    found.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    found.add_argument("--integer", action="store_true", help="a quantized network in integers")
    found.add_argument("--json", action="store_true", help="one line of JSON instead of words")
    return found


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 for an error."""
    args = parser().parse_args(argv)
    try:
        with joined(args.device) as (_, device):
            found = _evaluate(args, device)
    except COMMAND_ERRORS as error:
        say(f"error: {error}")
        return 2
    if args.json:
        print(json.dumps(found))
    else:
        score = f"test accuracy {found['test_accuracy']:.2f} %, loss {found['test_loss']:.4f}"
        say(f"{found['model']}: {score}, {found['images']:,} images")
    return 0


def _evaluate(args, device):
    path = find(args.run)
    model, facts = build.load(path, impl=args.impl, device=device)
    images = build.images(facts, args.data, image_size=args.image_size).to(device)
    precision = args.precision or facts["settings"]["precision"]
    if args.integer:
        model = build.integer(path, model)
    score = evaluation.evaluate(model, images, build.scale(facts, device), precision=precision)
    return {
        "model": facts["model"]["name"],
        "file": str(path),
        "data": images.name,
        "images": len(images.test_y),
        "test_accuracy": score.accuracy,
        "test_loss": score.loss,
    }


def find(run: str) -> Path:
    """The file to evaluate. CheckpointError where there is none."""
    path = Path(run)
    if not path.is_dir():
        return path
    for name in (WEIGHTS, CHECKPOINT):
        if (path / name).exists():
            return path / name
    raise CheckpointError(f"{path}: neither {WEIGHTS} nor {CHECKPOINT} is in it")


if __name__ == "__main__":
    sys.exit(main())
