"""The results in words and in tables."""

from bench.report.document import Bold, Items, Paragraph, Table
from bench.report.speedup import Alternatives, finite, geometric_mean, impls, milliseconds
from bench.schema import PEERS, Results, Row

TIMES = (
    "Times are medians in milliseconds, ± half the distance of the quartiles; the best of a row is bold. CUDA graphs "
    "where a case was timed so, and a time marked (eager) stands beside those and is not compared with them. The L2 "
    "cache is warm unless a table says otherwise. A speed-up is the other's time over ours, both in graphs or both "
    'eager. Ours is "auto"; where it was not tried, the fastest of ours that has a time.'
)
CPU = (
    "These are figures of a CPU, on which the Triton kernels do not run: they compare PyTorch's own operations with "
    "each other."
)
CPU_TIMES = (
    "Times are medians in milliseconds, ± half the distance of the quartiles; the best of a row is bold. A speed-up is "
    'the other\'s time over ours. Ours is "auto"; where it was not tried, the fastest of ours that has a time.'
)
_RATES = {
    "TFLOP/s": lambda row: _three(row.tflops),
    "GB/s": lambda row: _three(row.gbps),
    "of the roofline": lambda row: _percent(row.roofline_fraction),
    "images/s": lambda row: _thousands(row.images_per_s),
    "peak MiB": lambda row: _thousands(row.peak_mib),
}
_NONE = "-"


def head(results: list[Results], repeated: int) -> list:
    """Where, when and with what; `repeated` rows stand in several of the files."""
    device = results[0].device
    facts = [
        ("device", [_device(result.device) for result in results]),
        ("versions", [", ".join(f"{k} {v}" for k, v in result.versions.items()) for result in results]),
        ("measured", [f"{result.created}: {result.command}" for result in results]),
        ("git commit", [result.git_commit[:12] + " + changes" * result.git_dirty for result in results]),
        ("hash of the code measured", [result.sources_hash[:12] for result in results]),
        ("ceilings", [_ceilings(result.ceilings) for result in results]),
        ("cases not reached", [str(sum(len(result.unreached) for result in results))]),
    ]
    blocks = [Paragraph(CPU)] if device.get("type") == "cpu" else []
    blocks.append(Table(["", ""], [[name, "; ".join(dict.fromkeys(values))] for name, values in facts], text=2))
    absent = {peer: reason for result in results for peer, reason in result.absent.items()}
    if absent:
        blocks += [Paragraph("Not there:"), Items([f"{peer}: {reason}" for peer, reason in absent.items()])]
    if repeated:
        blocks.append(Paragraph(f"{repeated} rows were measured more than once; the latest are shown."))
    return blocks


def gates(rows: list[Row]) -> list:
    """How many rows failed their correctness gate, and which."""
    failed = [row for row in rows if not row.passed]
    if not failed:
        return [Paragraph("Every row passed its correctness gate.")]
    return [Paragraph(f"{len(failed)} of {len(rows)} rows FAILED their gate or never came to it:"), _troubles(failed)]


def summary(grouped: dict[tuple, list[Alternatives]]) -> Table | None:
    """Geometric means of the speed-ups of every group."""
    means = {key: _means(found) for key, found in grouped.items()}
    columns = [peer for peer in PEERS if any(own.get(peer) for own in means.values())]
    rows = [[*key, *(own.get(peer, _NONE) for peer in columns)] for key, own in means.items() if own]
    header = ["suite", "op", "dtype", "mode", *(f"over {peer}" for peer in columns)]
    return Table(header, rows, text=4) if rows else None


def group(found: list[Alternatives]) -> list:
    """Everything known of one operation in one dtype and mode."""
    rows = [row for case in found for row in case.rows.values()]
    troubles = [row for row in rows if milliseconds(row) is None]
    tables = [
        times(found, "warm"),
        speedups(found),
        _rates(found),
        times(found, "cold", fold="times with a cold L2 cache, ms"),
        _host(found),
    ]
    blocks = [table for table in tables if table]
    return blocks + ([Paragraph("Without a time:"), _troubles(troubles)] if troubles else [])


def times(found: list[Alternatives], l2: str, fold: str = "") -> Table | None:
    """A row for each shape, a column for each implementation."""
    columns = impls(found, l2)
    rows = []
    for case in found:
        shown = [case.shown(impl, l2) for impl in columns]
        alike = [row.ms_median for row in shown if milliseconds(row) and row.graph == case.graphed(l2)]
        if any(shown):
            rows.append([case.shape, str(case.batch), *(_time(case, row, l2, min(alike, default=0)) for row in shown)])
    return Table(["shape", "batch", *columns], rows, fold=fold) if rows else None


def _time(case, row, l2, best):
    if milliseconds(row) is None:
        return "failed" if row else _NONE
    text = _three(row.ms_median)
    if (low := finite(row.ms_q1)) is not None and (high := finite(row.ms_q3)) is not None:
        text += f" ±{(high - low) / row.ms_median / 2:.0%}"
    if row.graph != case.graphed(l2):
        return f"{text} (eager)"
    return Bold(text) if row.ms_median == best else text


def speedups(found: list[Alternatives]) -> Table | None:
    """Ours over each peer by shape, and the geometric means below."""
    columns = [peer for peer in PEERS if any(case.ratio(peer) for case in found)]
    rows = []
    for case in found:
        ratios = [case.ratio(peer) for peer in columns]
        rows.append([case.shape, str(case.batch), case.ours() or _NONE, *(_ratio(case, ratio) for ratio in ratios)])
    means = _means(found)
    rows.append(["geometric mean", "", "", *(Bold(means[peer]) for peer in columns)])
    return Table(["speed-up", "batch", "ours", *(f"over {peer}" for peer in columns)], rows, 3) if columns else None


def _ratio(case, ratio):
    if ratio is None:
        return _NONE
    return f"{ratio.value:.2f}" + " (eager)" * (case.graphed() and not ratio.graph)


def _means(found):
    """The means as text, by peer, each over the cases in which both have a time."""
    means = {}
    for peer in PEERS:
        if ratios := [ratio.value for case in found if (ratio := case.ratio(peer))]:
            means[peer] = f"{geometric_mean(ratios):.2f} of {len(ratios)}"
    return means


def _rates(found):
    """A row for each implementation of each shape; columns that are empty throughout are left out."""
    shown = [(case, row) for case in found for impl in impls(found) if milliseconds(row := case.shown(impl))]
    networks = found[0].suite == "models"  # images are what one counts there
    columns = {
        name: text
        for name, text in _RATES.items()
        if any(text(row) != _NONE for _, row in shown) and (networks or name != "images/s")
    }
    rows = [
        [case.shape, str(case.batch), row.impl, _three(row.ms_median), *(text(row) for text in columns.values())]
        for case, row in shown
    ]
    fold = "" if networks else ", ".join(columns)
    return Table(["shape", "batch", "impl", "ms", *columns], rows, 3, fold) if columns else None


def _host(found):
    """Until an eager call returns."""
    columns = impls(found)
    rows = []
    for case in found:
        own = [case.rows.get((impl, False, "warm")) for impl in columns]
        if any(row and row.host_ms for row in own):
            rows.append([case.shape, str(case.batch), *(_three(row and row.host_ms) for row in own)])
    fold = "eager launch: milliseconds until the call returns"
    return Table(["shape", "batch", *columns], rows, fold=fold) if rows else None


def _troubles(rows):
    """A line for what happened to an implementation in a case, in however many timings."""
    seen = {}
    for row in rows:
        where = f"{row.op} {row.shape}, batch {row.batch}, {row.dtype}, {row.mode}, {row.impl}"
        what = " ".join((row.error or "no reason was recorded").split())
        seen.setdefault((where, what), []).append(f"{'graph' if row.graph else 'eager'} {row.l2}")
    return Items([f"{where} ({', '.join(timings)}): {_short(what)}" for (where, what), timings in seen.items()])


def _short(text):
    return text if len(text) <= 400 else f"{text[:400]}…"


def _device(device):
    known = {name: value for name, value in device.items() if name not in ("name", "type")}
    return f"{device.get('name', 'unknown')} ({', '.join([device.get('type', 'type unknown'), *_pairs(known)])})"


def _pairs(known):
    """Words for what is in a dictionary, and in those within it."""
    for name, value in known.items():
        name = name.replace("_", " ")
        if isinstance(value, dict):
            yield from (f"{name} {pair}" for pair in _pairs(value))
        elif value is not None:
            yield f"{name} {value}"


def _ceilings(ceilings):
    names = {"copy_gbps": "copy", "l2_gbps": "within the L2"}
    parts = [f"{name} {ceiling(value)} GB/s" for key, name in names.items() if (value := finite(ceilings.get(key)))]
    matrix = ceilings.get("matmul_tflops") or {}
    parts += [f"{dtype} products {ceiling(value)} TFLOP/s" for dtype, value in matrix.items() if finite(value)]
    return ", ".join(parts) or "not measured"


def ceiling(value: float) -> str:
    """Whole numbers, or three digits where that is little."""
    return _thousands(value) if value >= 100 else _three(value)


def _three(value):
    """Three digits that count."""
    if finite(value) is None:
        return _NONE
    for digits, least in ((0, 100), (1, 10), (2, 1), (3, 0.1), (4, 0.01)):
        if abs(value) >= least:
            return f"{value:.{digits}f}"
    return f"{value:.5f}"


def _percent(value):
    return _NONE if finite(value) is None else f"{value:.0%}"


def _thousands(value):
    return _NONE if finite(value) is None else f"{value:,.0f}"
