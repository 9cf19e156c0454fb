"""The bar chart."""

from matplotlib.figure import Figure

from bench.memory.networks import FORMS
from bench.report.plots import COLOURS, png, styled

# the implementations' colours of the other figures; the fourth is the third's, hatched
_LOOK = {
    "eager": {"color": COLOURS["reference"]},
    "compile": {"color": COLOURS["compile"]},
    "fused": {"color": COLOURS["triton"]},
    "fused_recompute": {"facecolor": "white", "edgecolor": COLOURS["triton"], "hatch": "////"},
}


@styled
def bars(found: dict) -> bytes:
    """A PNG: four bars for each network, gigabytes at the batch."""
    titles = {row["network"]: f"{row['title']}\n{row['size']} px" for row in found["rows"]}
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(FORMS)
    for index, (form, label) in enumerate(FORMS.items()):
        own = {row["network"]: row["bytes"] / 1e9 for row in found["rows"] if row["form"] == form}
        places = [n + width * (index - (len(FORMS) - 1) / 2) for n, name in enumerate(titles) if name in own]
        heights = [own[name] for name in titles if name in own]
        drawn = axes.bar(places, heights, 0.9 * width, label=label, linewidth=1.2, **_LOOK[form])
        axes.bar_label(drawn, [f"{height:.2f}" if height < 10 else f"{height:.1f}" for height in heights], padding=2)
    axes.set_xticks(range(len(titles)), titles.values())
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.1)
    axes.set_ylabel("GB")
    axes.set_title(f"Kept for backward by one training step, {found['batch']} images, bf16 autocast (counted)")
    figure.legend(ncols=len(FORMS), loc="outside lower center")
    return png(figure)
