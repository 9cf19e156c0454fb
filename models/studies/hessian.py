"""python -m models.studies.hessian [--out DIR]: why a shortcut goes around two layers.

Li et al., "Demystifying ResNet" (arXiv 1611.01186), look at the linear network y = prod over blocks of (W^n .. W^1 + I)
x where it starts, W = 0, with the loss |y - target|^2 / 2, mean over the samples. The condition number of the Hessian
there says how hard the first steps are. With S_xx = E x x^T and S_yx = E target x^T:

    n = 1   the blocks' Hessians do not decouple: the condition number grows with the depth
    n = 2   blocks decouple, and each has the eigenvalues +-sigma of S_xx - S_yx: cond(S_xx - S_yx), at every depth
    n = 3   every second derivative has a factor W = 0: H = 0, gradient descent does not know where to go
"""

import argparse
import math
from pathlib import Path

import torch

from tooling import console
from tooling.files import save_json

BLOCKS = (1, 2, 4)
SHORTCUT_DEPTHS = (1, 2, 3)


def samples(count=1000, channels=4, seed=0):
    """Inputs and targets (channels, count) in fp64: normal inputs, a random linear map of them, and noise."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, channels, count, generator=generator, dtype=torch.float64)
    return x, torch.randn(channels, channels, generator=generator, dtype=torch.float64) @ x + 0.1 * noise


def loss(weights, x, target):
    """weights (blocks, n, channels, channels); x, target (channels, samples) -> |y - target|^2 / 2, their mean."""
    for block in weights:
        branch = x
        for weight in block:
            branch = weight @ branch
        x = branch + x
    return (x - target).square().sum() / (2 * x.shape[1])


def hessian(weights, x, target):
    """Second derivatives of `loss` by the weights: (P, P), P the number of weights in all."""
    found = torch.func.hessian(loss)(weights, x, target)
    return found.reshape(weights.numel(), weights.numel())


def condition_number(matrix):
    """Largest over smallest singular value; NaN where the matrix is zero, infinity where it is singular otherwise."""
    values = torch.linalg.svdvals(matrix)
    return math.nan if values[0] == 0 else (values[0] / values[-1]).item()


def run():
    """The Hessian at W = 0, for every shortcut depth and number of blocks: condition number and largest entry."""
    x, target = samples()
    found = []
    for depth in SHORTCUT_DEPTHS:
        for blocks in BLOCKS:
            at_zero = torch.zeros(blocks, depth, len(x), len(x), dtype=x.dtype)
            matrix = hessian(at_zero, x, target)
            row = {"shortcut_depth": depth, "blocks": blocks, "largest_entry": matrix.abs().max().item()}
            found.append(row | {"condition_number": condition_number(matrix)})
    theory = condition_number((x - target) @ x.T / x.shape[1])
    return {"theory_at_depth_2": theory, "rows": found}


def show(results):
    """Prints the table."""
    header = ["shortcut depth n", *(f"{blocks} block{'s' * (blocks > 1)}" for blocks in BLOCKS)]
    cells = []
    for depth in SHORTCUT_DEPTHS:
        rows = [row for row in results["rows"] if row["shortcut_depth"] == depth]
        cells.append([str(depth), *(f"{r['condition_number']:.4g}" if r["largest_entry"] else "H = 0" for r in rows)])
    console.table(header, cells, title="condition number of the Hessian at W = 0")
    console.note(f"cond(S_xx - S_yx) = {results['theory_at_depth_2']:.4g}: what n = 2 has at every depth")


def write(results, folder):
    """hessian.json and hessian.png into `folder`, which is made; a Hessian of zero has the condition number null."""
    from matplotlib.figure import Figure

    folder = Path(folder)
    save_json(folder / "hessian.json", {"kind": "hessian", **results})

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for depth in SHORTCUT_DEPTHS:
        line = [row for row in results["rows"] if row["shortcut_depth"] == depth and row["largest_entry"]]
        if line:
            axes.plot(
                [row["blocks"] for row in line], [row["condition_number"] for row in line], "o-", label=f"n = {depth}"
            )
    axes.set(xlabel="blocks", ylabel="cond(H) at W = 0", yscale="log", xticks=BLOCKS)
    axes.set_title("around n layers; at n = 3, H = 0", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(folder / "hessian.png", dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.studies.hessian", description="Shortcuts around 1, 2, 3 layers."
    )
    parser.add_argument("--out", metavar="DIR", help="write hessian.json and hessian.png there")
    args = parser.parse_args(argv)
    results = run()
    show(results)
    if args.out:
        write(results, args.out)


if __name__ == "__main__":
    main()
