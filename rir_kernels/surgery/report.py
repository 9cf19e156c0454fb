"""Reports what fuse_ did, for people (print, a notebook) and for programs (attributes, to_dict)."""

import dataclasses
import html
import math
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from ..common.fused_class import class_of
from ..common.tables import THE_MODEL
from .pattern_names import CODES

_SHOWN = 4  # names shown per group; the rest is counted


@dataclass(frozen=True)
class Replaced:
    """One fused operation. A container with several operations has one entry for each, all under its name.

    name: the module whose forward is replaced, as in named_modules ("" is the model itself); also: its other names.
    pattern: "conv_bn_act" and so on; code: "P1" ... "P6". kind: the module's class. parts: names of the children that
    are bypassed.
    """

    name: str
    pattern: str
    kind: str
    impl: str
    parts: tuple[str, ...]
    also: tuple[str, ...] = ()

    @property
    def code(self) -> str:
        return CODES[self.pattern]


@dataclass(frozen=True)
class Skipped:
    """A convolution or norm that is in no fused operation, or a module that might have had one, and why.

    within: the name of the module in whose forward it is used, if it has an entry with the same reason; else None.
    """

    name: str
    reason: str
    kind: str
    also: tuple[str, ...] = ()
    within: str | None = None


@dataclass(frozen=True)
class Coverage:
    """How much of a model runs as fused operations, including modules that were fused before.

    operations: their number. convolutions: the number of Conv2d modules; fused: how many of them are in an operation.
    macs_share: the multiply-adds of fused convolutions over those of all convolutions and matrix products in one
    forward; None if no inputs were given.
    """

    operations: int
    convolutions: int
    fused: int
    macs_share: float | None = None

    @property
    def share(self) -> float:
        """Returns fused / convolutions; 0.0 if there are no convolutions."""
        return self.fused / self.convolutions if self.convolutions else 0.0

    def to_dict(self) -> dict:
        """Returns the numbers by name, ready for JSON."""
        return dataclasses.asdict(self) | {"share": self.share}

    def __str__(self) -> str:
        parts = [f"{self.fused} of {self.convolutions} convolutions ({_percent(self.share)})"]
        if self.macs_share is not None:
            parts.append(f"{_percent(self.macs_share)} of the MACs")
        return ", ".join(parts)


@dataclass
class FusionReport:
    """What fuse_ or fold_bn_ (`verb`) replaced in `model` and what it skipped; after a dry run, what it would have.

    `skipped` has every convolution and norm that is in no fused operation; print() groups them. coverage: None for
    fold_bn_.
    """

    model: nn.Module
    dry_run: bool = False
    verb: str = "fuse"
    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    coverage: Coverage | None = None

    def to_dict(self) -> dict:
        """Returns plain dicts, lists and strings, ready for JSON, with the model as its class name."""
        return {
            "model": class_of(self.model).__name__,
            "dry_run": self.dry_run,
            "replaced": [_plain(item) for item in self.replaced],
            "skipped": [_plain(item) for item in self.skipped],
            "coverage": None if self.coverage is None else self.coverage.to_dict(),
        }

    def __str__(self) -> str:
        lines = [self._title()]
        for heading, groups in self._sections():
            lines.append(f"{heading}:")
            lines += [f"  {len(items)} x {title}: {names}" for title, items, names in groups]
        return "\n".join(lines)

    __repr__ = __str__  # the dataclass's would print the whole model

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><td>{html.escape(heading)}</td><td>{html.escape(title)}</td><td>{len(items)}</td>"
            f"<td>{html.escape(names)}</td></tr>"
            for heading, groups in self._sections()
            for title, items, names in groups
        ]
        return (
            f"<p>{html.escape(self._title())}</p><table><thead><tr><th></th><th>what</th><th>count</th>"
            f"<th>modules</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )

    def _title(self):
        done = f"would {self.verb}" if self.dry_run else "fused"
        text = f"{class_of(self.model).__name__}: {done} {len(self.replaced)} operations"
        end = f"skipped {len(self.skipped)}"
        coverage = self.coverage
        if coverage is None:
            return f"{text}, {end}"
        before = coverage.operations - len(self.replaced)
        text += f" ({before} fused before)" if before else ""
        return f"{text}: {coverage}; {end}" if coverage.convolutions else f"{text}, {end}"

    def _sections(self):
        """Returns the nonempty sections as (heading, [(title, items, their names)])."""
        replaced = _grouped(
            self.replaced, lambda item: f"{item.pattern} in {item.kind}" + (f", impl={item.impl}" if item.impl else "")
        )
        cause, told, parts = self._causes()
        skipped = _grouped(
            [item for item in self.skipped if id(item) not in told], lambda item: f"{item.kind}, {cause[id(item)]}"
        )
        heading = "to be replaced" if self.dry_run else "replaced"
        sections = (
            (heading, [(title, items, _names(items)) for title, items in replaced.items()]),
            ("skipped", [(title, items, _names(items) + _with(items, parts)) for title, items in skipped.items()]),
        )
        return [section for section in sections if section[1]]

    def _causes(self):
        """Returns three results by entry id: the reason without the module that it names; the entries whose cause an
        enclosing module's entry gives, so that it is printed once; and for that entry, how many of which kind they are.
        """
        names = {name or THE_MODEL for name, _ in self.model.named_modules()}
        cause: dict[int, str] = {}
        around: dict[tuple, Skipped] = {}
        told: set[int] = set()
        parts: dict[int, Counter[str]] = {}
        for item in self.skipped:
            about, _, rest = item.reason.partition(": ")
            cause[id(item)] = rest if item.within is not None and about in names else item.reason
            around.setdefault((item.name, item.reason), item)
        for item in self.skipped:
            other = around.get((item.within, cause[id(item)]))
            if other is not None and other is not item:
                told.add(id(item))
                parts.setdefault(id(other), Counter())[item.kind] += 1
        return cause, told, parts


def _grouped(items, title):
    groups: dict[str, list] = {}
    for item in items:
        groups.setdefault(title(item), []).append(item)
    return dict(sorted(groups.items()))


def _names(items):
    """Formats the names: a container with several operations once, and only the first few of many."""
    names: dict[str, int] = {}
    for item in items:
        label = item.name or f"({THE_MODEL})"
        if item.also:
            label += f" (also {', '.join(name or f'({THE_MODEL})' for name in item.also)})"
        names[label] = names.get(label, 0) + 1
    labels = [label if count == 1 else f"{label} x{count}" for label, count in names.items()]
    more = len(labels) - _SHOWN
    return ", ".join(labels[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _with(items, parts):
    """Formats how many items of which kind have no separate entry."""
    kinds: Counter[str] = sum((parts.get(id(item), Counter()) for item in items), Counter())
    return f", with {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}" if kinds else ""


def _percent(share):
    """Formats a percentage, rounded down, so that 100 % means all."""
    return f"{math.floor(100 * share + 1e-9)} %"


def _plain(item):
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(item).items()
    }
