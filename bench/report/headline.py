"""What the README says of the speed, written from the committed results."""

import os
import re
from pathlib import Path

from bench.report.check import is_stale
from bench.report.document import table
from bench.report.plots import speedups
from bench.report.speedup import Alternatives, cases, geometric_mean, groups
from bench.schema import PEERS, Results, kind_of, load_all

MARKERS = BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PICTURE = "speedup.png"
NOTHING = "Nothing is claimed that was not measured, and nothing has been measured on a GPU yet."
_OP, _DTYPE, _BATCH = "rir_layer", "bf16", 256


def block(folder: str | Path, root: str | Path) -> str:
    """The text between the markers, from the newest results of a GPU in `folder`; links start at `root`."""
    found = _newest(Path(folder))
    if found is None:
        return NOTHING
    place, results = found
    headline = _headline(results)
    link = Path(os.path.relpath(place, root)).as_posix()
    newest = results[-1]
    versions = ", ".join(f"{k} {newest.versions[k]}" for k in ("torch", "triton", "cuda") if k in newest.versions)
    where = f"Measured on {newest.device['name']}, {newest.created[:10]}, {versions}"
    report = "report.md" if (place / "report.md").exists() else ""
    parts = [f"{where}: [all figures]({link}/{report})." + _stale(results)]
    if not headline:
        return parts[0] + f" Among them is no {_OP} in {_DTYPE} with {_BATCH} images."
    parts[0] += (
        f' How many times as fast as its peers "auto" is, one `RiRLayer` in {_DTYPE}, {_BATCH} images, CUDA graphs, '
        "warm L2; geometric means, and over how many shapes:"
    )
    grouped = groups(headline)
    peers = [peer for peer in PEERS if any(_ratio(case, peer) for case in headline)]
    means = [[mode, *(_mean(own, peer) for peer in peers)] for (*_, mode), own in grouped.items()]
    parts.append(table(["mode", *peers], means))
    parts.append(f"![Speed-up of a RiRLayer over its peers, by shape]({link}/{PICTURE})")
    shapes = table(["shape", "mode", *peers], [_shape(case, peers) for case in headline], 2)
    return "\n\n".join([*parts, "<details><summary>shape by shape</summary>", shapes, "</details>"])


def update(readme: str | Path, folder: str | Path) -> bool:
    """Rewrites the block in `readme` and the picture that it shows; was the text another one before?

    ValueError where the markers are missing.
    """
    readme = Path(readme)
    text = readme.read_text(encoding="utf-8")
    new = replaced(text, block(folder, readme.parent), readme, MARKERS)
    found = _newest(Path(folder))
    if found and (headline := _headline(found[1])):
        picture = speedups(headline, PICTURE, f"{_OP} {_DTYPE}")
        (found[0] / PICTURE).write_bytes(picture.png)
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


def current(readme: str | Path, folder: str | Path) -> bool:
    """Does the README say what the committed results say? ValueError where the markers are missing."""
    text = Path(readme).read_text(encoding="utf-8")
    return text == replaced(text, block(folder, Path(readme).parent), readme, MARKERS)


def replaced(text: str, content: str, path: str | Path, markers: tuple[str, str]) -> str:
    """`text`, which `path` holds, with `content` between the markers; ValueError where they are missing."""
    begin, end = markers
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{path}: expected {begin} and {end} once, each on a line of its own: put them in")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def _newest(folder) -> tuple[Path, list[Results]] | None:
    """The device that was measured last, and its results in the order of time; those of a CPU do not count."""
    devices = []
    for place in sorted({path.parent for path in folder.glob("*/*.json") if kind_of(path) is None}):
        results = sorted(load_all(place), key=lambda result: result.created)
        if results := [result for result in results if result.device.get("type") == "cuda"]:
            devices.append((place, results))
    return max(devices, key=lambda device: device[1][-1].created, default=None)


def _stale(results):
    return " Measured with earlier code, which has changed since." * any(map(is_stale, results))


def _headline(results) -> list[Alternatives]:
    """The cases that the headline is made of, those too in which "auto" failed; none where it has nothing to say."""
    rows = {row.key: row for result in results for row in result.rows if row.graph}.values()
    found = [c for c in cases(rows) if (c.suite, c.op, c.dtype, c.batch) == ("layers", _OP, _DTYPE, _BATCH)]
    found = [case for case in found if case.ours() == "auto"]
    return found if any(case.ratio(peer) for case in found for peer in PEERS) else []


def _shape(case, peers):
    ratios = [_number(_ratio(case, peer)) for peer in peers]
    return [case.shape, case.mode, *(ratios if case.time("auto", True) else ["failed"] * len(peers))]


def _ratio(case, peer):
    ratio = case.ratio(peer)
    return ratio and ratio.value


def _mean(own, peer):
    ratios = [ratio for case in own if (ratio := _ratio(case, peer))]
    return f"{_number(geometric_mean(ratios))} of {len(ratios)}" if ratios else "-"


def _number(value):
    return "-" if value is None else f"{value:.2f}"
