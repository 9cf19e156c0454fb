"""The results as one HTML page that needs nothing from elsewhere, and as JSON."""

import json
from html import escape
from pathlib import Path

from bench.report.page import PAGE
from tooling.files import save_json

from . import plots, tables

REGISTERS = 255  # that a thread can have
FAILED, LONG = ' class="failed"', ' class="long"'


def write(results: dict, folder: str | Path) -> tuple[Path, Path]:
    """report.html and results.json in `folder`, which is made where it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "report.html", folder / "results.json"
    page.write_text(build(results), encoding="utf-8")
    save_json(data, results)
    return page, data


def build(results: dict) -> str:
    """The page."""
    chapters = (_head, _fusion, _equivalence, _training, _kernels, _compiled, _speeds, _environment)
    return PAGE.format(
        title=f"rir_kernels: {'equivalent' if results['passed'] else 'NOT equivalent'}",
        style=Path(__file__).with_name("report.css").read_text(encoding="utf-8"),
        body="\n".join(chapter(results) for chapter in chapters),
    )


def _head(results):
    passed = results["passed"]
    verdict = '<span class="good">equivalent</span>' if passed else '<span class="bad">not equivalent</span>'
    failures = "".join(f"<li{FAILED}>{escape(failure)}</li>" for failure in results["failures"])
    failures = failures and f'<ul class="checks">{failures}</ul>'
    return (
        f"<h1>A fused network, and the naive one: {verdict}</h1>"
        '<p class="lead">rir_kernels runs convolution, batch norm, ReLU and the identity add of a block as one '
        "operation. On this page a Resnet in Resnet is fused, compared tensor by tensor with the original, and trained "
        "beside it.</p>"
        f"{failures}{_facts(results)}"
        f"<p>{escape(tables.data_line(results))} Trained and compared on {escape(results['device']['name'])}.</p>"
    )


def _facts(results):
    reports = [*results["equivalence"], *results["kernels"]]
    tensors = [row["passed"] for report in reports for row in report["rows"]]
    compiled = results["compiled"]["rows"]
    accuracy = results["training"]["accuracy"]
    facts = {
        "operations fused": len(results["fusion"]["replaced"]),
        "tensors within their budgets": f"{sum(tensors)}/{len(tensors)}",
        "test accuracy, naive and fused": f"{accuracy['naive']:.1f} / {accuracy['fused']:.1f} %",
    }
    if compiled:
        label = f"kernels through the gate for {results['compiled']['arch']}"
        facts[label] = f"{sum(row['passed'] for row in compiled)}/{len(compiled)}"
    pairs = (f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def _fusion(results):
    rows = tables.fusion_rows(results)
    return (
        "<h2>What was fused</h2>"
        "<p>A layer of a Resnet in Resnet has two streams, residual r and transient t, four convolutions between them, "
        "an identity add on r, and a norm and a ReLU on each:</p>"
        "<pre>r' = relu(BN(conv(r, W_rr) + conv(t, W_tr) + r))\nt' = relu(BN(conv(r, W_rt) + conv(t, W_tt)))</pre>"
        "<p>Both streams are halves of one tensor, so it is one convolution with a weight of four blocks, an add on "
        "the first channels, and one norm. <code>rir.fuse_(model)</code> changes how forward runs, and nothing else: "
        "parameters, names and checkpoints stay.</p>"
        f"<p>{escape(tables.network_line(results))}.</p>"
        + _details(f"all {len(rows)} units", _table(["", "module", "what"], rows, text=3))
    )


def _equivalence(results):
    reports = results["equivalence"]
    training = next(report for report in reports if report["train"])
    groups = {"output, running statistics": [], "gradients of input and convolutions": [], "gradients of norms": []}
    for row in training["rows"]:
        names = list(groups)
        forward, norm = row["kind"] in ("output", "buffer"), "bn" in row["name"].split(".")[-2:][0]
        groups[names[0] if forward else names[2] if norm else names[1]].append(row)
    everything = tables.worst_rows(reports, count=None)
    return (
        f"<h2>The same function</h2><p>{escape(tables.BUDGET)}</p>"
        + _figure(
            plots.errors(
                list(groups.items()), "Error of every tensor of the fused network, PyTorch's own, and the budget"
            ),
            "Training mode, one mark a tensor. Ours belongs below the dashes; an error of exactly zero is not drawn.",
        )
        + _table(tables.SUMMARY_HEADER, tables.summary_rows(reports), text=2)
        + _details(
            f"all {len(everything)} tensors", _table(tables.ROW_HEADER, everything, text=3, failed=_failed(reports))
        )
    )


def _failed(reports):
    """The indices of failed rows, where those of a report come first, as in worst_rows."""
    start, indices = 0, set()
    for report in reports:
        indices |= set(range(start, start + sum(not row["passed"] for row in report["rows"])))
        start += len(report["rows"])
    return indices


def _training(results):
    checks = "".join(
        f"<li{'' if check['passed'] else FAILED}>{escape(check['name'])} "
        f'<span class="note">({escape(check["detail"])})</span></li>'
        for check in results["training"]["checks"]
    )
    return (
        f"<h2>The same training</h2><p>{escape(tables.CHAOS)}</p>"
        + _figure(
            plots.loss_curves(results["training"]),
            "Above, both losses, the fused one drawn over the naive one. Below, how far the fused network and the "
            "control are from the naive one; steps that agree in every bit lie on the lower edge.",
        )
        + f'<ul class="checks">{checks}</ul>'
        + _table(tables.TRAINING_HEADER, tables.training_rows(results))
        + f'<p class="note">{escape(tables.speed_note(results))}</p>'
    )


def _kernels(results):
    title = "<h2>The kernels against fp64</h2>"
    cases = results["kernels"]
    if not cases:
        return title + _skipped(results, "kernels")
    dtypes = dict.fromkeys(case["dtype"] for case in cases)
    groups = [(dtype, [row for case in cases if case["dtype"] == dtype for row in case["rows"]]) for dtype in dtypes]
    return (
        f"{title}<p>The Triton kernels of single layers, forward and backward, {escape(tables.where(results))}. "
        "Errors of the output and of the convolutions' gradients, beside those PyTorch makes; a layer's name is its "
        "channels, /2 for stride 2, and its image.</p>"
        + _table(tables.KERNEL_HEADER, tables.kernel_rows(cases), text=3, failed=_failed_cases(cases))
        + _figure(
            plots.errors(groups, "Error of every tensor of the layers, PyTorch's own, and the budget"),
            "Every tensor of these layers, in both modes.",
        )
    )


def _failed_cases(cases):
    return {index for index, case in enumerate(cases) if not case["passed"]}


def _compiled(results):
    arch, rows = results["compiled"]["arch"], results["compiled"]["rows"]
    title = f"<h2>The kernels, compiled for {escape(arch)}</h2>"
    if not rows:
        return title + _skipped(results, "compiled")
    convolutions = tables.convolutions(rows)
    failed = {index for index, row in enumerate(rows) if not row["passed"]}
    return (
        f"{title}<p>Every kernel that the eleven layers of the shape table launch, in bf16, as a GPU would get it; no "
        "GPU is needed to compile. A kernel fails the gate if it spills registers, wants more shared memory than there "
        "is, converts layouts or loads operands in the loop around its matrix product, or has no wgmma there. The "
        "convolution kernels, in the table from their smallest number to their largest:</p>"
        + _figure(
            plots.resources(convolutions, REGISTERS, results["compiled"]["shared_kb"]),
            "Shapes are channels@image. Dotted: what the GPU has.",
        )
        + _table(tables.COMPILED_SUMMARY_HEADER, tables.compiled_summary(rows))
        + _details(
            f"all {len(rows)} kernels, those of the norms too",
            _table(tables.COMPILED_HEADER, tables.compiled_rows(rows), text=2, failed=failed),
        )
    )


def _speeds(results):
    if cases := results["emulated"]:
        return f"<h2>The compiled kernels, emulated</h2><p>{escape(tables.EMULATED)}</p>" + _table(
            tables.KERNEL_HEADER, tables.kernel_rows(cases), text=3, failed=_failed_cases(cases)
        )
    title = "<h2>The kernels' speed</h2>"
    if not results["speeds"]:
        return title + _skipped(results, "speeds")
    return (
        f"{title}<p>{escape(tables.SPEEDS.format(results['device']['name']))}</p>"
        + _figure(plots.speedups(results["speeds"]), "Above the dotted line: faster than four naive convolutions.")
        + _table(tables.SPEED_HEADER, tables.speed_rows(results), text=2)
    )


def _environment(results):
    environment = json.dumps(results["environment"], indent=1, ensure_ascii=False)
    seconds = [[title, f"{value:.1f}"] for title, value in results["seconds"].items()]
    return (
        "<h2>Where this ran</h2>"
        + _table(["chapter", "seconds"], seconds)
        + f"<pre>{escape(environment)}</pre>"
        + '<p class="note">All numbers of this page are in results.json beside it.</p>'
    )


def _skipped(results, chapter):
    return f"<p>{escape(results['skipped'][chapter])}</p>"


def _figure(svg, caption):
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _details(summary, content):
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _table(header, rows, *, text=1, failed=()):
    """The first `text` columns hold words, the others numbers; `failed` are indices of rows."""

    def line(tag, cells):
        classes = [' class="number"' if i >= text else LONG * (len(cell) > 48) for i, cell in enumerate(cells)]
        return "".join(f"<{tag}{c}>{escape(cell)}</{tag}>" for c, cell in zip(classes, cells, strict=True))

    body = "".join(f"<tr{FAILED if i in failed else ''}>{line('td', row)}</tr>" for i, row in enumerate(rows))
    return f'<div class="scroll"><table><thead><tr>{line("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'
