"""python -m models.studies.ablation RUN [--out DIR]: what each stream of each layer is worth.

Targ, Almeida and Lyman (arXiv 1603.08029) ask by zeroing what the network has learned to use: the output of one stream
of one layer becomes zero, all else stays, and the accuracy that is lost says what flowed there. The residual stream
reaches later layers through their identities too; the transient one through convolutions alone.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import rir_kernels as rir
from models.evaluate import find
from models.training import build, evaluation
from models.training.errors import COMMAND_ERRORS, SettingsError
from models.training.ranks import joined
from tooling import provenance
from tooling.console import say
from tooling.files import save_json

STREAMS = ("residual", "transient")
_LAYERS = (rir.RiRLayer, rir.reference.RiRLayer)


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of every layer of two streams, in the order of the model. SettingsError where there is none."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, _LAYERS)]
    found = [(name, m) for name, m in found if 0 < m.out_residual < m.out_channels]
    if not found:
        raise SettingsError(f"{type(model).__name__} has no layers of two streams: RiR and ResNet Init do")
    return found


@contextmanager
def without(layer: nn.Module, stream: str) -> Iterator[None]:
    """Within it the layer's output has zeros for that stream, whether it is packed or (r', t')."""
    parts = {"residual": slice(None, layer.out_residual), "transient": slice(layer.out_residual, None)}

    def zero(_, inputs, output):
        if isinstance(output, tuple):
            return tuple(
                torch.zeros_like(part) if name == stream else part for name, part in zip(STREAMS, output, strict=True)
            )
        output = output.clone()
        output[:, parts[stream]] = 0
        return output

    handle = layer.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def ablate(model: nn.Module, images, scale, *, precision: str = "fp32", progress=None) -> dict:
    """Test accuracy in percent, whole and without each stream of each layer: plain data.

    images: models.data.Images on the model's device; scale: as evaluation.evaluate takes it.
    """
    found = layers(model)

    def accuracy():
        return evaluation.evaluate(model, images, scale, precision=precision).accuracy

    whole = accuracy()
    rows = []
    for name, layer in found:
        row = {"layer": name}
        for stream in STREAMS:
            with without(layer, stream):
                row[stream] = accuracy()
        rows.append(row)
        if progress:
            progress(row)
    return {"test_accuracy": whole, "images": len(images.test_y), "rows": rows}


def draw(results: dict, path: Path) -> None:
    """A PNG: points lost, layer by layer, one curve for each stream."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    places = range(1, len(results["rows"]) + 1)
    for stream, colour in zip(STREAMS, ("C0", "C1"), strict=True):
        lost = [results["test_accuracy"] - row[stream] for row in results["rows"]]
        axes.plot(places, lost, "o-", color=colour, label=f"without its {stream} stream")
    axes.set(xlabel="layer", ylabel="accuracy lost, points", xticks=list(places))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 for an error."""
    parser = argparse.ArgumentParser(prog="python -m models.studies.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="folder of a run, or one of its safetensors files")
    parser.add_argument("--data", metavar="PATH", help="default: where the run had its images from")
    parser.add_argument("--image-size", type=int, metavar="N", help="folders of images: pixels to bring each to")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--out", metavar="DIR", help="write ablation.json and ablation.png there")
    args = parser.parse_args(argv)
    try:
        _report(args)
    except COMMAND_ERRORS as error:
        say(f"error: {error}")
        return 2
    return 0


def _report(args):
    with joined(args.device) as (_, device):
        path = find(args.run)
        model, facts = build.load(path, device=device)
        images = build.images(facts, args.data, image_size=args.image_size).to(device)
        say(f"{facts['model']['name']} on {images.name}; test accuracy without one stream of one layer, %")
        results = ablate(
            model,
            images,
            build.scale(facts, device),
            precision=facts["settings"]["precision"],
            progress=lambda row: say("  ".join([f"{row['layer']:28}", *(f"{s} {row[s]:6.2f}" for s in STREAMS)])),
        )
    say(f"{'with all':28}  {results['test_accuracy']:.2f}")
    if args.out:
        folder = Path(args.out)
        made = provenance.of_a_run(device, "ablation")
        save_json(
            folder / "ablation.json",
            {"kind": "ablation", **made, "model": facts["model"], "data": facts["data"], **results},
        )
        draw(results, folder / "ablation.png")


if __name__ == "__main__":
    sys.exit(main())
