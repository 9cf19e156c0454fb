"""The figures, as SVG that takes its colours and its font from the page around it: dark on light, or light on dark."""

import functools
import io
import math
import re

import matplotlib
from matplotlib.figure import Figure

# drawn in colours that nobody would choose, which then become the page's own
_STAND_INS = {name: f"#0100{i:02x}" for i, name in enumerate(("ink", "muted", "grid", "ours", "torch", "control"), 1)}
_INK, _MUTED, _GRID, _OURS, _TORCH, _CONTROL = _STAND_INS.values()
_FLOOR = 1e-8  # where a difference of zero is drawn on a logarithmic axis

_STYLE = {
    "svg.fonttype": "none", "font.size": 10.5, "legend.frameon": False, "legend.labelcolor": _INK, "text.color": _INK,
    "axes.edgecolor": _MUTED, "axes.labelcolor": _INK, "axes.facecolor": "none", "figure.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": _GRID, "grid.linewidth": 0.8, "xtick.color": _MUTED, "ytick.color": _MUTED,
    "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "ytick.minor.left": False,
}  # fmt: skip


def _styled(draw):
    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


@_styled
def loss_curves(training: dict) -> str:
    """The losses of both networks, and below how far the fused one and the control are from the naive one."""
    figure, (top, bottom) = _figure(2, height=5.2, sharex=True, height_ratios=(3, 2))
    losses = training["losses"]
    steps = range(1, len(losses["naive"]) + 1)
    top.plot(steps, losses["naive"], color=_TORCH, linewidth=4.5, alpha=0.55, label="naive")
    top.plot(steps, losses["fused"], color=_OURS, linewidth=1.6, label="fused")
    top.set_ylabel("training loss")
    top.set_ylim(bottom=0)
    for name, colour, style in (("control", _CONTROL, "--"), ("fused", _OURS, "-")):
        values = [max(value, _FLOOR) for value in training["difference"][name]]
        bottom.semilogy(steps, values, color=colour, linestyle=style, linewidth=1.6, label=name)
    bottom.set_ylabel("difference from naive")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.legend(loc="best")
    return _svg(figure, "Loss of the naive and the fused network at every step, and the difference between them")


@_styled
def errors(groups: list[tuple[str, list[dict]]], label: str) -> str:
    """Every tensor's error against fp64, ours beside PyTorch's own and the budget, in labelled groups of rows."""
    figure, (axes,) = _figure(1, height=3.4)
    columns = {"budget": [], "reference_error_max": [], "error_max": []}
    places, starts, position = [], [], 0
    for _, rows in groups:
        starts.append(position)
        for row in (row for row in rows if row["budget"]):  # integers have to be equal: nothing to draw
            for name, values in columns.items():
                values.append(row[name] or math.nan)  # an error of exactly zero has no place on this axis
            places.append(position)
            position += 1
        position += 2
    size = max(2.2, min(6.0, 300 / max(len(places), 1)))
    axes.semilogy(places, columns["budget"], "_", color=_INK, markersize=size + 1, label="budget")
    hollow = {"markerfacecolor": "none", "markeredgecolor": _TORCH, "markersize": size}
    axes.semilogy(places, columns["reference_error_max"], "o", **hollow, label="PyTorch's own error")
    axes.semilogy(places, columns["error_max"], ".", color=_OURS, markersize=size + 1, label="ours")
    for start in starts[1:]:
        axes.axvline(start - 1.5, color=_GRID, linewidth=1)
    ends = [start - 2 for start in starts[1:]] + [position - 3]
    middles = [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]
    axes.set_xticks(middles, [name for name, _ in groups])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("largest error against fp64")
    axes.margins(x=0.01)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, markerscale=2)
    return _svg(figure, label)


@_styled
def resources(rows: list[dict], registers: int, shared_kb: float) -> str:
    """Registers and shared memory of the convolution kernels of every shape; `registers` and `shared_kb` are limits."""
    figure, (left, right) = _figure(1, 2, height=4.2, sharey=True)
    shapes = list(dict.fromkeys(row["shape"] for row in rows))[::-1]
    styles = list(zip(dict.fromkeys(row["op"] for row in rows), (_OURS, _CONTROL, _TORCH, _INK), "os^D", strict=False))
    for axes, field, limit, label in (
        (left, "registers", registers, "registers per thread, at most"),
        (right, "shared_kb", shared_kb, "KB of shared memory, at most"),
    ):
        for offset, (op, colour, marker) in enumerate(styles):
            own = [row for row in rows if row["op"] == op]
            heights = [shapes.index(row["shape"]) + 0.2 * (1.5 - offset) for row in own]
            axes.plot([row[field] for row in own], heights, marker, color=colour, markersize=4.5, label=op)
        axes.axvline(limit, color=_INK, linestyle=":", linewidth=1.4)
        axes.set_xlim(0, limit * 1.06)
        axes.set_xlabel(f"{label} {limit:g}")
        axes.set_yticks(range(len(shapes)), shapes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return _svg(figure, "Registers and shared memory of the convolution kernels, shape by shape")


@_styled
def speedups(rows: list[dict]) -> str:
    """How many times faster than the naive layer each implementation was, by shape; one panel for each mode."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, panels = _figure(len(modes), height=2.6 * len(modes), sharex=True)
    names = [name for name in rows[0]["ms"] if name != "naive"]
    for axes, mode in zip(panels, modes, strict=True):
        own = [row for row in rows if row["mode"] == mode]
        for i, (name, colour) in enumerate(zip(names, (_INK, _OURS, _CONTROL, _TORCH), strict=True)):
            places = [place + 0.2 * (i - (len(names) - 1) / 2) for place in range(len(own))]
            ratios = [row["ms"]["naive"] / row["ms"][name] for row in own]
            axes.bar(places, ratios, 0.18, color=colour, label=name)
        axes.axhline(1, color=_INK, linestyle=":", linewidth=1.4)
        axes.set_ylabel(f"{mode}:\ntimes as fast as naive")
        axes.set_xticks(range(len(own)), [row["shape"] for row in own], rotation=30, ha="right")
        axes.grid(axis="x", visible=False)
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names))
    return _svg(figure, "Speed of each implementation as a multiple of the naive layer's")


def _figure(rows, columns=1, *, height, **layout):
    """(figure, its axes in reading order)"""
    figure = Figure(figsize=(8.2, height), layout="constrained")  # not pyplot: no window, no global state
    return figure, list(figure.subplots(rows, columns, squeeze=False, **layout).flat)


def _svg(figure, label):
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    size = re.search(r'viewBox="[^"]*"', text).group()
    body = text[text.index("</metadata>") + len("</metadata>") :]
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the same ids stand in every figure
    body = re.sub(r"font-family: [^;]*; ?", "", body)
    body = body.replace("xlink:href", "href")
    for name, stand_in in _STAND_INS.items():
        body = body.replace(stand_in, f"var(--{name})")
    return f'<svg {size} role="img" aria-label="{label}">{body}'
