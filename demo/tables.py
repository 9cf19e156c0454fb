"""The results in words and in rows of text, for the terminal and for the page alike."""

from .kernels import CONV_KERNELS

BUDGET = (
    "The truth is the naive network in fp64, on the same inputs and weights. Outputs, running statistics and the "
    "gradients of the input and of every parameter may be off by twice what PyTorch itself is off by in the same "
    "dtype, and by two roundings: that is their budget."
)
CHAOS = (
    "Training is chaotic: a rounding error grows until the curves differ visibly, whatever the code. So a control is "
    "trained too: the naive network with every starting weight changed by one rounding. The fused network must not "
    "stray further than such a twin does."
)
SPEEDS = "Milliseconds of one layer on {}, bf16, channels_last, CUDA graphs, medians of variants that take turns:"
SUMMARY_HEADER = ["mode", "kind", "tensors", "passed", "budget used"]
ROW_HEADER = ["mode", "kind", "tensor", "error", "torch's", "budget"]
TRAINING_HEADER = ["network", "first loss", "last loss", "test accuracy", "a step"]
KERNEL_HEADER = ["layer", "dtype", "mode", "output", "torch's", "grad W", "torch's", "budget used"]
COMPILED_HEADER = ["shape", "op", "registers", "spills", "shared KB", "tensor core", "converts", "local loads", "gate"]
COMPILED_SUMMARY_HEADER = COMPILED_HEADER[1:-1]
SPEED_HEADER = ["shape", "mode", "naive", "auto", "triton", "hybrid", "torch", "naive/auto"]

_COUNTS = ("registers", "spills", "shared_kb", "products", "conversions", "local_loads")


def data_line(results) -> str:
    found, settings = results["data"], results["settings"]
    channels, height, width = found["image"]
    return (
        f"Data: {found['name']}, {found['train']:,} images to train on and {found['test']:,} to test on, "
        f"{height}x{width}, {channels} channel{'s' * (channels > 1)}. {settings['steps']} steps of {settings['batch']}."
    )


def network_line(results) -> str:
    network = results["network"]
    width = ", ".join(map(str, network["width"]))
    return f"{network['name']}, {width} channels, {network['parameters']:,} parameters"


def fusion_rows(results) -> list[list[str]]:
    """[what was done, where, with which operation] of every unit."""
    fusion = results["fusion"]
    rows = [
        ["fused", item["name"] or "the model", f"{item['pattern']} in {item['kind']}"] for item in fusion["replaced"]
    ]
    return rows + [["skipped", item["name"] or "the model", item["reason"]] for item in fusion["skipped"]]


def mode(report) -> str:
    return "train" if report["train"] else "eval"


def used(row) -> float:
    """The part of its budget that an error takes."""
    if not row["error_max"]:
        return 0.0 if row["passed"] else float("inf")
    return row["error_max"] / row["budget"] if row["budget"] else float("inf")


def summary_rows(reports) -> list[list[str]]:
    rows = []
    for report in reports:
        for kind in dict.fromkeys(row["kind"] for row in report["rows"]):
            own = [row for row in report["rows"] if row["kind"] == kind]
            passed = sum(row["passed"] for row in own)
            rows.append([mode(report), kind, str(len(own)), str(passed), f"{max(map(used, own)):.0%}"])
    return rows


def worst_rows(reports, count: int | None = 3) -> list[list[str]]:
    """The `count` rows of each report that take most of their budgets, failed ones first; None for all."""
    rows = []
    for report in reports:
        worst = sorted(report["rows"], key=lambda row: (row["passed"], -used(row)))[:count]
        rows += [[mode(report), *_row(row)] for row in worst]
    return rows


def _row(row):
    numbers = (_number(row[name]) for name in ("error_max", "reference_error_max", "budget"))
    note = f" ({row['note']})" if row["note"] else ""
    return row["kind"] + ("" if row["passed"] else ", FAILED"), row["name"] + note, *numbers


def _number(value):
    return "" if value is None else f"{value:.1e}" if value else "0"


def training_rows(results) -> list[list[str]]:
    training = results["training"]
    return [
        [
            name,
            f"{losses[0]:.5f}",
            f"{losses[-1]:.5f}",
            f"{training['accuracy'][name]:.1f} %",
            f"{1000 * training['seconds_per_step'][name]:.1f} ms",
        ]
        for name, losses in training["losses"].items()
    ]


def speed_note(results) -> str:
    """What the seconds per step are of."""
    seconds = results["training"]["seconds_per_step"]
    device = results["device"]
    ratio = f"Medians on {device['name']}; naive / fused = {seconds['naive'] / seconds['fused']:.2f}. "
    if device["type"] == "cpu":
        return ratio + (
            "On a CPU the fused network runs PyTorch's own operations, one convolution and one norm in place of four "
            "and two: this compares their numbers, and says nothing of the Triton kernels, which do not run here."
        )
    return ratio + "With Python's overhead, which small layers wait for; the kernels alone are timed further down."


def where(results) -> str:
    """The kernels ran."""
    return "on the GPU" if results["device"]["type"] == "cuda" else "in Triton's interpreter, on the CPU"


EMULATED = (
    "No GPU is here, so no speed was measured. What Triton compiled for one was executed instead, instruction by "
    "instruction, on this CPU: emulated, and in bf16, which the interpreter has not."
)


def kernel_rows(cases) -> list[list[str]]:
    return [
        [
            case["title"],
            case["dtype"].replace("bfloat", "bf").replace("float", "fp"),
            mode(case),
            *_pair(row for row in case["rows"] if row["kind"] == "output"),
            *_pair(row for row in case["rows"] if row["kind"] == "param grad" and "conv" in row["name"]),
            f"{max(map(used, case['rows'])):.0%}",
        ]
        for case in cases
    ]


def _pair(rows):
    """Ours and PyTorch's largest errors."""
    rows = [(row["error_max"] or 0.0, row["reference_error_max"] or 0.0) for row in rows]
    return [f"{max(errors, default=0.0):.1e}" for errors in zip(*rows, strict=True)] or ["", ""]


def convolutions(rows) -> list[dict]:
    return [row for row in rows if row["kernel"] in CONV_KERNELS]


def compiled_rows(rows) -> list[list[str]]:
    return [
        [row["shape"], row["op"], *(f"{row[name]:.0f}" for name in _COUNTS), "; ".join(row["faults"]) or "passed"]
        for row in rows
    ]


def compiled_summary(rows) -> list[list[str]]:
    """For each use of the convolution kernels, the range of every number over the shapes."""
    rows = convolutions(rows)
    return [
        [op, *(_range([row[name] for row in rows if row["op"] == op]) for name in _COUNTS)]
        for op in dict.fromkeys(row["op"] for row in rows)
    ]


def _range(values):
    low, high = min(values), max(values)
    return f"{low:.0f}" if low == high else f"{low:.0f}-{high:.0f}"


def speed_rows(results) -> list[list[str]]:
    return [
        [
            row["shape"],
            row["mode"],
            *(f"{ms:.3f}" for ms in row["ms"].values()),
            f"{row['ms']['naive'] / row['ms']['auto']:.2f}",
        ]
        for row in results["speeds"]
    ]


def closing(results) -> str:
    """The whole demo in a line."""
    reports = [*results["equivalence"], *results["kernels"], *results["emulated"]]
    tensors = [row["passed"] for report in reports for row in report["rows"]]
    parts = [
        f"equivalent: {'yes' if results['passed'] else 'NO'}",
        f"{len(results['fusion']['replaced'])} operations fused",
        f"{sum(tensors)} of {len(tensors)} tensors within their budgets",
    ]
    if rows := results["compiled"]["rows"]:
        parts.append(f"{sum(row['passed'] for row in rows)} of {len(rows)} kernels pass the compile gate")
    return "; ".join([*parts, f"{sum(results['seconds'].values()):.0f} s"])
