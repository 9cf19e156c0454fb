"""What fuse_ did, for people (print, a notebook) and for programs (attributes, to_dict)."""

import dataclasses
import html
from dataclasses import dataclass, field

from torch import nn

from .swap import class_of

_SHOWN = 4  # names of a group, before the rest is counted


@dataclass(frozen=True)
class Replaced:
    """One fused operation. A container that holds several gives one for each, all with its own name.

    name: the module whose forward is replaced, as in named_modules ("" is the model itself); also: its other names.
    pattern: "P1" ... "P6". kind: the module's class. parts: names of the children that are bypassed.
    """

    name: str
    pattern: str
    kind: str
    impl: str
    parts: tuple[str, ...]
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """Something that looked like a known block, or is one, and why it was left alone."""

    name: str
    reason: str
    kind: str
    also: tuple[str, ...] = ()


@dataclass
class FusionReport:
    """What fuse_ replaced in `model` and what it skipped; after a dry run, what it would have. verb: or fold_bn_."""

    model: nn.Module
    dry_run: bool = False
    verb: str = "fuse"
    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain dicts, lists and strings, ready for JSON; the model as its class name."""
        return {
            "model": class_of(self.model).__name__,
            "dry_run": self.dry_run,
            "replaced": [_plain(item) for item in self.replaced],
            "skipped": [_plain(item) for item in self.skipped],
        }

    def __str__(self) -> str:
        lines = [self._title()]
        for heading, groups in self._sections():
            lines.append(f"{heading}:")
            lines += [f"  {len(items)} x {title}: {_names(items)}" for title, items in groups.items()]
        return "\n".join(lines)

    __repr__ = __str__  # the fields would print the whole model

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><td>{html.escape(heading)}</td><td>{html.escape(title)}</td><td>{len(items)}</td>"
            f"<td>{html.escape(_names(items))}</td></tr>"
            for heading, groups in self._sections()
            for title, items in groups.items()
        ]
        return (
            f"<p>{html.escape(self._title())}</p><table><thead><tr><th></th><th>what</th><th>count</th>"
            f"<th>modules</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )

    def _title(self):
        done = f"would {self.verb}" if self.dry_run else "fused"
        kind = class_of(self.model).__name__
        return f"{kind}: {done} {len(self.replaced)} operations, skipped {len(self.skipped)}"

    def _sections(self):
        """(heading, {title: items}), without the empty ones."""
        replaced = _grouped(
            self.replaced, lambda item: f"{item.pattern} in {item.kind}" + (f", impl={item.impl}" if item.impl else "")
        )
        skipped = _grouped(self.skipped, lambda item: f"{item.kind}, {item.reason}")
        heading = "to be replaced" if self.dry_run else "replaced"
        return [section for section in ((heading, replaced), ("skipped", skipped)) if section[1]]


def _grouped(items, title):
    groups = {}
    for item in items:
        groups.setdefault(title(item), []).append(item)
    return dict(sorted(groups.items()))


def _names(items):
    """The names, a container with several operations once, and only the first few of many."""
    names = {}
    for item in items:
        label = item.name or "(the model itself)"
        if item.also:
            label += f" (also {', '.join(name or '(the model itself)' for name in item.also)})"
        names[label] = names.get(label, 0) + 1
    labels = [label if count == 1 else f"{label} x{count}" for label, count in names.items()]
    more = len(labels) - _SHOWN
    return ", ".join(labels[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _plain(item):
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(item).items()
    }
