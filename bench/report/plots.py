"""The figures, as PNGs: dark on white, an implementation in the same colour everywhere."""

import functools
import io
import math

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from bench.report.document import Picture
from bench.report.speedup import Alternatives, finite, groups, impls
from bench.report.tables import ceiling
from bench.schema import OURS, PEERS, Results

# after Okabe and Ito: told apart without red and green
COLOURS = {
    "reference": "#999999", "merged": "#e69f00", "compile": "#56b4e9", "compile_max_autotune": "#0072b2",
    "cudnn": "#009e73", "tensorrt": "#cc79a7", "torch": "#c9b458", "hybrid": "#882255", "triton": "#d55e00",
    "auto": "#111111",
}  # fmt: skip
# the ops of one training step, in their order; after Tol, and no implementation's colours
STEP = {
    "conv_train": "#332288", "finalize": "#999933", "normalize": "#88ccee", "reduce": "#ddcc77", "apply": "#44aa99",
    "data_grad": "#cc6677", "weight_grad": "#aa4499",
}  # fmt: skip
_MARKERS = "os^vDPX*<>"
_STYLE = {
    "font.size": 9.5, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e2e2e2", "grid.linewidth": 0.8, "axes.titlesize": 10.5,
    "axes.titlelocation": "left", "xtick.labelsize": 9, "ytick.labelsize": 9,
}  # fmt: skip


def pictures(found: list[Alternatives], results: list[Results]) -> list[Picture]:
    """Every figure that these cases and the ceilings of `results` allow, and why the others are missing."""
    sets = {}
    for case in found:
        # kernels have a panel for each op, layers a figure for each, networks stand side by side
        name = f"{case.op}_{case.dtype}" if case.suite == "layers" else case.dtype
        sets.setdefault(f"{case.suite}_{name}", []).append(case)
    drawn = [speedups(own, f"speedup_{name}.png", name.replace("_", " ")) for name, own in sets.items()]
    return [*drawn, roofline(found, results), breakdown(found)]


def speedups(found: list[Alternatives], name: str, title: str) -> Picture:
    """Bars for how many times as fast as each peer ours is, by shape; a panel for each op or mode."""
    title = f"Speed-up, {title}"
    panels = {}
    for (suite, op, _, mode), own in groups(found).items():
        panels.setdefault(f"{op} ({mode})" if suite == "kernels" else mode, []).extend(own)
    panels = {panel: own for panel, own in panels.items() if any(case.ratio(peer) for case in own for peer in PEERS)}
    if not panels:
        return Picture(name, title, "left out, as no case has both a time of ours and one of a peer.", None)
    caption = (
        "Bars upwards: ours is faster, by that factor; downwards: slower. Where a bar is missing there is no time of "
        "one or the other."
    )
    return Picture(name, title, caption, _bars(panels, [peer for peer in PEERS if peer in impls(found)]))


def styled(draw):
    """`draw` in the style of all figures."""

    @functools.wraps(draw)
    def wrapper(*args):
        with matplotlib.rc_context(_STYLE):
            return draw(*args)

    return wrapper


@styled
def _bars(panels, peers):
    columns = 2 if len(panels) > 4 else 1
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(7.0 * columns if columns > 1 else 11, 2.5 * rows + 0.7), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (panel, own) in zip(grid, panels.items(), strict=False):
        drawn = [peer for peer in peers if any(case.ratio(peer) for case in own)]
        width = 0.84 / len(drawn)
        for i, peer in enumerate(drawn):
            bars = [(n, ratio.value) for n, case in enumerate(own) if (ratio := case.ratio(peer))]
            places = [n + width * (i - (len(drawn) - 1) / 2) for n, _ in bars]
            axes.bar(places, [value - 1 for _, value in bars], width, bottom=1, color=COLOURS[peer])
        axes.set_yscale("log", base=2)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.7), max(high, 1.5))
        axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0,) if high / low > 12 else (1.0, 2**0.5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}x"))
        axes.minorticks_off()
        axes.axhline(1, color="#111111", linewidth=1)
        axes.set_title(panel)
        missing = [n for n, case in enumerate(own) if not any(case.ratio(peer) for peer in drawn)]
        axes.plot(missing, [1] * len(missing), "x", color="#777777", markersize=6)
        axes.set_xticks(range(len(own)), _labels(own), rotation=35, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, len(own) - 0.4)
        axes.grid(axis="x", visible=False)
    handles = [matplotlib.patches.Patch(color=COLOURS[peer], label=f"over {peer}") for peer in peers]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return png(figure)


def _labels(own):
    """Shapes, with op and batch where these differ."""
    ops, batches = {case.op for case in own}, {case.batch for case in own}
    prefix = [f"{case.op} " if len(ops) > 1 else "" for case in own]
    suffix = [f" x{case.batch}" if len(batches) > 1 else "" for case in own]
    return [p + case.shape + s for p, case, s in zip(prefix, own, suffix, strict=True)]


def roofline(found: list[Alternatives], results: list[Results]) -> Picture:
    """Arithmetic intensity against TFLOP/s, of ours and of the fastest peer, under the measured ceilings."""
    name, title = "roofline.png", "Roofline"
    points = {}
    for suite in ("kernels", "layers"):
        points = points or _points([case for case in found if case.suite == suite])
    copy, l2, matrix = _ceilings(results)
    if not points:
        return Picture(name, title, "left out, as no kernel or layer has both TFLOP/s and GB/s.", None)
    if not copy:
        return Picture(name, title, "left out, as the ceiling of a copy was not measured.", None)
    caption = (
        "The arithmetic and the traffic that an operation cannot do without. Filled: ours; hollow: the fastest peer. "
        "The lines are ceilings measured in the same run; what fits into the L2 cache can pass the sloping one. The "
        "norm's kernels have no products to count: the tables have their share of the roofline."
    )
    return Picture(name, title, caption, _roofline(points, copy, l2, matrix))


def _points(found):
    """{dtype: [(op, impl, FLOP/byte, TFLOP/s)]} of ours and of the fastest peer of each case."""
    points = {}
    for case in found:
        peers = [row for impl in PEERS if case.time(impl, case.graphed()) and (row := case.shown(impl))]
        ours = case.shown(case.ours()) if case.ours() else None
        for row in (min(peers, key=lambda row: row.ms_median, default=None), ours):
            if row and row.passed and (finite(row.tflops) or 0) > 0 and (finite(row.gbps) or 0) > 0:
                point = case.op, row.impl, 1e3 * row.tflops / row.gbps, row.tflops
                points.setdefault(case.dtype, []).append(point)
    return points


def _ceilings(results):
    """Those of the last run that measured them."""
    merged = {}
    for result in results:
        merged |= {key: value for key, value in result.ceilings.items() if value}
    matrix = {dtype: value for dtype, value in merged.get("matmul_tflops", {}).items() if finite(value)}
    return finite(merged.get("copy_gbps")), finite(merged.get("l2_gbps")), matrix


@styled
def _roofline(points, copy, l2, matrix):
    figure = Figure(figsize=(max(8.5, 5.5 * len(points)), 5.4), layout="constrained")
    ops = list(dict.fromkeys(op for own in points.values() for op, *_ in own))
    marker = {op: _MARKERS[i % len(_MARKERS)] for i, op in enumerate(ops)}
    for axes, (dtype, own) in zip(figure.subplots(1, len(points), squeeze=False).flat, points.items(), strict=True):
        for op, impl, intensity, tflops in own:
            colour = COLOURS.get(impl, "#555555")
            face = colour if impl in OURS else "none"
            axes.plot(intensity, tflops, marker[op], color=colour, markerfacecolor=face, markersize=6, alpha=0.85)
        top = matrix.get(dtype, math.inf)
        left, right = min(own, key=lambda point: point[2])[2] / 2, max(own, key=lambda point: point[2])[2] * 2
        for speed, style, label in ((copy, "-", "copy"), (l2, ":", "L2")):
            if speed:
                knee = min(max(1e3 * top / speed, left), right)
                axes.plot(
                    [left, knee, right],
                    [min(x * speed / 1e3, top) for x in (left, knee, right)],
                    style,
                    color="#111111",
                    linewidth=1.2,
                    label=f"{label} {ceiling(speed)} GB/s",
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(left, right)
        axes.set_xlabel("FLOP per byte")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(f"{dtype}: products at {ceiling(top)} TFLOP/s" if top < math.inf else dtype)
        axes.legend(loc="lower right")
    figure.axes[0].set_ylabel("TFLOP/s")
    handles = [Line2D([], [], marker=marker[op], color="#777777", linestyle="none", label=op) for op in ops]
    names = dict.fromkeys(impl for own in points.values() for _, impl, *_ in own)
    for impl in sorted(names, key=lambda impl: (impl in PEERS, impl)):
        face = COLOURS.get(impl, "#555555") if impl in OURS else "none"
        handles.append(
            Line2D(
                [],
                [],
                marker="o",
                color=COLOURS.get(impl, "#555555"),
                markerfacecolor=face,
                linestyle="none",
                label=impl,
            )
        )
    figure.legend(handles=handles, loc="outside right upper")
    return png(figure)


def breakdown(found: list[Alternatives]) -> Picture:
    """Where the time of one training step goes, shape by shape."""
    name, title = "breakdown.png", "Time of the kernels of one training step"
    found = [case for case in found if case.suite == "kernels" and case.op in STEP]
    counts = {impl: sum(1 for case in found if case.time(impl, case.graphed())) for impl in impls(found)}
    if not any(counts.values()):
        return Picture(name, title, "left out, as no kernel of a training step has a time.", None)
    impl = "triton" if counts.get("triton") else max(counts, key=counts.get)
    shapes = {}
    for case in found:
        if ms := case.time(impl, case.graphed()):
            shapes.setdefault((case.dtype, case.shape, case.batch), {})[case.op] = ms
    dtype = next(iter(shapes))[0]
    bars = {f"{shape} x{batch}": own for (its, shape, batch), own in shapes.items() if its == dtype}
    caption = f'Medians of "{impl}" in {dtype}, each kernel timed alone.'
    if any(len(own) < len(STEP) for own in bars.values()):
        caption += " An asterisk marks a shape of which some kernel has no time: its bar is too short."
    return Picture(name, title, caption, _stacked(bars, f"milliseconds, {impl}, {dtype}"))


@styled
def _stacked(bars, label):
    figure = Figure(figsize=(9.5, 0.36 * len(bars) + 1.5), layout="constrained")
    axes = figure.subplots()
    totals = [sum(own.values()) for own in bars.values()]
    for place, (own, total) in enumerate(zip(bars.values(), totals, strict=True)):
        start = 0.0
        for op, colour in STEP.items():
            axes.barh(place, own.get(op, 0), 0.72, left=start, color=colour, edgecolor="white", linewidth=0.6)
            start += own.get(op, 0)
        axes.text(total + 0.008 * max(totals), place, f"{total:.3g}", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [name + " *" * (len(own) < len(STEP)) for name, own in bars.items()])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 1.08 * max(totals))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    handles = [matplotlib.patches.Patch(color=colour, label=op) for op, colour in STEP.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return png(figure)


def png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return file.getvalue()
