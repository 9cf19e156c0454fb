"""What a run leaves behind: one JSON file, version SCHEMA. README.md in this folder documents every field."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tooling.files import save_json

SCHEMA = 1

SUITES = ("kernels", "layers", "models")
OURS = ("torch", "hybrid", "triton", "auto")
PEERS = ("reference", "merged", "compile", "compile_max_autotune", "cudnn", "tensorrt")
IMPLS = (*PEERS, *OURS)
MODES = ("eval", "train_fwd", "bwd", "step", "step_recompute")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation of one thing in one mode, timed in one way; or why it was not timed."""

    suite: str
    op: str
    shape: str
    batch: int
    dtype: str
    impl: str
    mode: str
    graph: bool = False
    l2: str = "warm"
    ms_median: float | None = None
    ms_q1: float | None = None
    ms_q3: float | None = None
    host_ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    floor_ms: float | None = None
    roofline_fraction: float | None = None
    images_per_s: float | None = None
    peak_mib: float | None = None
    passed: bool = False
    budget_used: float | None = None
    error: str | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: list[float] = dataclasses.field(default_factory=list)

    @property
    def case(self) -> tuple:
        """What is measured: rows of one case are alternatives to each other."""
        return self.suite, self.op, self.shape, self.batch, self.dtype, self.mode

    @property
    def key(self) -> tuple:
        """Unique within a file."""
        return *self.case, self.impl, self.graph, self.l2

    @property
    def of(self) -> str:
        """Its `bench.cases.case.Case`, as text."""
        return f"{self.op} {self.shape} x{self.batch} {self.dtype}"


@dataclasses.dataclass(kw_only=True)
class Results:
    """A run: where, with what, and its rows."""

    schema: int = SCHEMA
    created: str  # UTC, ISO 8601
    command: str
    device: dict[str, Any]
    versions: dict[str, str]
    git_commit: str
    git_dirty: bool
    sources_hash: str
    settings: dict[str, Any]
    ceilings: dict[str, Any]
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    unreached: list[str] = dataclasses.field(default_factory=list)
    begun: str | None = None  # the case that is being measured
    lost: list[str] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)

    def save(self, path: str | Path) -> Path:
        """`save_json` of everything."""
        return save_json(path, dataclasses.asdict(self))


class ResultsError(ValueError):
    """A file that is not a benchmark result of this schema."""


def load(path: str | Path) -> Results:
    """The file's contents; ResultsError where it is something else, with what came and how to fix it."""
    data = read_json(path)
    if isinstance(data, dict) and "kind" in data:
        raise ResultsError(
            f"{path}: expected a suite's times, got results of the kind {data['kind']!r}: name another file"
        )
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ResultsError(f"{path}: expected schema {SCHEMA}, got {found}: measure again with this version")
    try:
        rows = [Row(**row) for row in data.pop("rows")]
        return Results(**data, rows=rows)
    except (KeyError, TypeError) as error:
        raise ResultsError(f"{path}: not of schema {SCHEMA} ({error}): measure again with this version") from error


def read_json(path: str | Path) -> Any:
    """What the file holds; ResultsError where that is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(
            f"{path}: cannot be read as JSON ({error}): pass a file that `python -m bench` wrote"
        ) from error


def kind_of(path: str | Path) -> str | None:
    """What a file says it holds, such as "memory"; None for the benchmark's times. ResultsError where it is no JSON."""
    data = read_json(path)
    return data.get("kind") if isinstance(data, dict) else None


def load_all(*paths: str | Path) -> list[Results]:
    """The results in these files and folders, in a fixed order.

    Of a folder: its *.json, not below, and not those with a `kind`, which are other results (README.md).
    """
    files = []
    for path in map(Path, paths):
        files += sorted(file for file in path.glob("*.json") if kind_of(file) is None) if path.is_dir() else [path]
    if not files:
        raise ResultsError(f"no results in {', '.join(map(str, paths))}: run `python -m bench --out DIR` first")
    return [load(file) for file in files]
