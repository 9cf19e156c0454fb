"""python -m bench gpu: everything there is to measure on a GPU, in pieces, the most telling first.

A call takes as many pieces as its minutes allow and the next call goes on, until nothing is missing. Each piece is a
command of the benchmark that continues its own file; a case that hangs is killed, noted as lost, and left out.
"""

from dataclasses import dataclass
from pathlib import Path

from bench.first.steps import StepPiece
from bench.measure.run import refused_ours
from bench.pieces import Piece, State, sources_now, work
from bench.schema import ResultsError, load, read_json
from tooling.process import Ended

SILENT = 240.0  # seconds: longer than any case takes to compile and tune
WHOLE = 3600.0
BF16 = ("--dtype", "bf16")

# file: arguments. A file with the same rows as another one has its own folder
SUITES = {
    "layers": ("layers", "--ops", "rir_layer", *BF16),
    "models": ("models", *BF16),
    "kernels": ("kernels", *BF16),
    "blocks": ("layers", "--ops", "basic_block", "rir_block", *BF16),
    "layers-fp16-fp32": ("layers", "--ops", "rir_layer", "--dtype", "fp16", "fp32"),
    "overlap/layers": ("layers", "--ops", "rir_layer", *BF16, "--overlap"),
}
_SMALL = ("--dtype", "fp16", "--shapes", "64@8", "--batch", "1", "--quick", "--dry")
DRY = {
    "layers": ("layers", "--ops", "rir_layer", "--impl", "reference", "torch", *_SMALL),
    "kernels": ("kernels", "--ops", "finalize", "--impl", "merged", *_SMALL),
}


@dataclass(frozen=True)
class SuitePiece(Piece):
    """A suite of the benchmark, or a part of one, that continues its file."""

    name: str
    arguments: tuple[str, ...]
    out: Path
    seconds: float = WHOLE
    silent: float | None = SILENT

    @property
    def _file(self) -> Path:
        return self.out / f"{self.name}.json"

    def state(self) -> State:
        try:
            results = load(self._file)
        except ResultsError:
            return State()
        if results.sources_hash != sources_now(self.arguments[0], results.device["type"], results.device["name"]):
            return State()
        refused = refused_ours(results)
        parts = [f"{len(results.rows)} rows"]
        if results.unreached:
            parts.append(f"{len(results.unreached)} cases missing, such as {results.unreached[0]}")
        parts += [f"lost: {case}" for case in results.lost] + [f"refused: {line}" for line in refused[:3]]
        done = not results.unreached and results.begun is None
        progress = len(results.rows) + len(results.lost) + (results.begun is not None)
        return State(True, done, bool(results.lost or refused), progress, "; ".join(parts))

    def command(self, seconds, retry):
        return [
            *self.arguments,
            "--name",
            self.name,
            "--out",
            str(self.out),
            "--resume",
            "--minutes",
            f"{seconds / 60}",
        ]

    def ended(self, how: Ended) -> None:
        """Its file says at which case."""


@dataclass(frozen=True)
class TunePiece(Piece):
    """The fastest tiles. They go to the results, not among the kernels: what was measured was measured without them."""

    out: Path
    name: str = "tiles"
    seconds: float = WHOLE
    silent: float | None = SILENT

    def state(self) -> State:
        files = list((self.out / "tiles").glob("*.json"))
        if not files:
            return State()
        missing = read_json(files[0])["unreached"]
        return State(True, not missing, False, -len(missing), f"{files[0]}, {len(missing)} missing")

    def command(self, seconds, retry):
        return ["tune", *BF16, "--out", str(self.out / "tiles"), "--minutes", f"{seconds / 60}"]

    def ended(self, how: Ended) -> None:
        """What it has measured is in its file."""


def run_all(out: Path, minutes: float, *, dry: bool) -> bool:
    """Takes the next pieces, writes the report, and says what is missing; whether nothing failed."""
    suites = [SuitePiece(name, arguments, out) for name, arguments in (DRY if dry else SUITES).items()]
    steps = [StepPiece(name, out, dry) for name in ("tests",)]
    return work([*suites[:3], *steps, *suites[3:], *([] if dry else [TunePiece(out)])], minutes)
