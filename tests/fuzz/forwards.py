"""Modules as source text, drawn: what forward may do with convolutions, norms, sums, views and what decides branches.

All tensors are images of one shape, so that most lines go with each other; those that do not must raise alike.
"""

import re
from dataclasses import dataclass, field

from hypothesis import strategies as st

from .changes import changes

HEAD = """\
import copy
import functools
import pickle
import types

import torch
import torch.nn.functional as F
from torch import nn"""
# names that a text uses, and what defines them
GLOBALS = {
    "SWITCH": "SWITCH = False",
    "CONFIG": 'CONFIG = {"by": 1.0}',
    "FACTORS": "FACTORS = [1.0, 2.0]",
    "switch": "def switch():\n    global SWITCH\n    SWITCH = not SWITCH",
    "PLACE": "PLACE = types.SimpleNamespace(by=2.0)",
    "PARTIAL": "PARTIAL = functools.partial(torch.mul, other=0.5)",
    "ACTS": "ACTS = [torch.tanh, torch.relu]",
    "KEPT": "KEPT = []",
    "Settings": "class Settings:\n    on = False",
    "helper": "def helper(y, by=1.0, *, on=True):\n    return y * by if on and SWITCH else y",
    "closed": (
        "def make(by):\n    def closed(y):\n        return y if by is None else y * by\n    return closed\n\n\n"
        "closed = make(None)"
    ),
    "Writes": "class Writes(nn.Module):\n    def forward(self, y):\n        y.mul_(0.5)\n        return y",
    "Views": "class Views(nn.Module):\n    def forward(self, y):\n        return y[:]",
    "Asks": (
        "class Asks(nn.Module):\n    on = False\n\n    def forward(self, y):\n        return y * 2 if self.on else y"
    ),
}
MEMBERS = {
    "flag": "self.flag = True",
    "alpha": "self.alpha = 0.5",
    "steps": "self.steps = [1.0, 0.5]",
    "options": 'self.options = {"by": 0.5}',
    "count": "self.count = 0",
    "outputs": "self.outputs = []",
    "nothing": "self.nothing = None",
    "gain": "self.gain = nn.Parameter(torch.ones(()))",
    "offset": 'self.register_buffer("offset", torch.ones(4, 1, 1))',
    "writes": "self.writes = Writes()",
    "views": "self.views = Views()",
    "asks": "self.asks = Asks()",
    "same": "self.same = nn.Identity()",
    "pool": "self.pool = nn.AvgPool2d(3, 1, 1)",
    "drop": "self.drop = nn.Dropout(0.3)",
}
CONVS = (
    "nn.Conv2d(4, 4, 3, padding=1)", "nn.Conv2d(4, 4, 3, padding=1, bias=False)", "nn.Conv2d(4, 4, 1)",
    'nn.Conv2d(4, 4, 3, padding="same")', "nn.Conv2d(4, 4, 3, padding=1, groups=2)",
)  # fmt: skip
NORMS = (
    "nn.BatchNorm2d(4)", "nn.BatchNorm2d(4)", "nn.BatchNorm2d(4, momentum=None)", "nn.BatchNorm2d(4, affine=False)",
    "nn.BatchNorm2d(4, track_running_stats=False)",
)  # fmt: skip
RELUS = ("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.Identity()")
# h: the latest tensor, o: where the result goes, v: any tensor, c, n, m, r: a convolution, norms, a ReLU
CONVOLVE = ("{o} = {c}({h})",)
NORMALIZE = ("{o} = {n}({h})",)
RECTIFY = (
    "{o} = {r}({h})", "{o} = F.relu({h})", "{o} = F.relu({h}, inplace=True)", "{o} = torch.relu({h})",
    "{o} = {h}.relu_()", "{o} = {h}.relu()", "{o} = F.relu({h}, True)", "{h}.relu_()", "{o} = torch.relu_({h})",
)  # fmt: skip
ADD = (
    "{o} = {h} + {v}", "{o} = {v} + {h}", "{h} += {v}", "{o} = torch.add({h}, {v})", "{o} = {h}.add({v})",
    "{o} = torch.add({h}, {v}, alpha=0.5)", "{o} = {h}.add_({v})", "{h}.add_({v})", "{v} += {h}", "{o} = {h} + {h}",
    "{o} = {h} + {v}[:, :1]", "{h} += {v}[:, :1]", "{o} = {h} + {v}.mean((2, 3), keepdim=True)", "{o} = {h} + 1",
    "{o} = sum([{h}, {v}])", "{h} -= {v}", "{o} = torch.add({h}, other={v})", "{h} += {v}.float()",
)  # fmt: skip
SCALE = (
    "{o} = {h} * 0.3", "{h} *= 0.5", "{o} = 0.5 * {h}", "{o} = torch.mul({h}, 0.1)", "{o} = {h} * self.alpha",
    "{o} = {h}.mul_(2)", "{o} = {h} / 2", "{o} = -{h}", "{o} = {h} * self.gain", "{o} = {h} * 1", "{o} = {h} * -1.5",
)  # fmt: skip
WRITE = (
    "{v}[:, :1].mul_(2)", "{v}.relu_()", "{v}.permute(1, 0, 2, 3)[0].zero_()", "{v}.transpose(2, 3).add_(1)",
    "{v}.view(2, -1).mul_(0.5)", "{v}.data.add_(1)", "{v}.detach().mul_(0.5)", "F.relu({v}, True)", "{v} += 1",
    "{v} *= 0.5", "{v}[0] = 0", "self.writes({v})", "self.writes({v}[:, 1:])", "self.writes(self.same({v}))",
    "{o} = self.views({v})", "{o} = {v}[:]", "{o} = {v}", "{o} = {v}.view_as({v})", "{o} = {v}.detach()",
    "{o} = {v}.flip(3).flip(3)", "{o} = {v}.transpose(2, 3)", "{o} = {v}.contiguous()", "{o} = {v}.clone()",
    "torch.mul({v}, 2, out={v}.detach())", "F.leaky_relu({v}, 0.1, True)", "{v}.chunk(2, 1)[1].clamp_(min=0)",
    "{o}, {v}[:, 0] = {v}, 1", "{v}.copy_({h})", "{o} = self.same({v})", "{o} = {v}.to({v}.dtype)",
)  # fmt: skip
STATISTICS = (
    "{o} = {h} + {n}.running_mean.sum()", "{o} = {h} * {n}.weight.mean()", "{o} = {h} * {c}.weight.mean()",
    "{n}.running_mean.mul_(0.5)", "{n}.weight.data.mul_(0.5)", "{c}.weight.data.mul_(0.5)", "{n}.running_var.fill_(1)",
    "{o} = F.batch_norm({v}, {n}.running_mean, {n}.running_var, {n}.weight, {n}.bias, self.training)",
    "{o} = F.batch_norm({v}, {n}.running_mean, {n}.running_var)",
    "{o} = {h} + {n}.running_mean.view(1, -1, 1, 1)", "{o} = F.conv2d({v}, {c}.weight, padding={c}.padding)",
    "{o} = {h} + {n}.running_mean.view(1, -1, 1, 1).expand(2, 4, 6, 6)", "{o} = {h} * (1 + {n}.eps)",
    "{o} = {h} + {n}.num_batches_tracked", "{n}.num_batches_tracked.zero_()",
)  # fmt: skip
MIX = (
    "{o} = torch.cat(({h}[:, :2], {v}[:, 2:]), 1)", "{o} = torch.cat([{h}, {v}], 1)[:, 2:6]", "{o} = self.pool({h})",
    "a, b = {h}.chunk(2, 1)\n{o} = torch.cat((b, a), 1)", "{o} = F.avg_pool2d({h}, 3, 1, 1)", "{o} = self.drop({h})",
    "{o} = F.max_pool2d({h}, 3, 1, 1)", "{o} = {h}.float().to(x.dtype)", "{o} = {h}.type_as(x)",
    "{o} = {h}.to(memory_format=torch.channels_last)", "{o} = F.dropout({h}, 0.3, self.training)", "{o} = {h}.double()",
    "{o} = torch.where({h} > 0, {h}, {v})", "{o} = {h}.softmax(1)", "{o} = {h}.permute(0, 1, 3, 2)",
    "{o} = {h}[:, [1, 0, 2, 3]]", "{o} = torch.stack([{h}, {v}]).mean(0)",
)  # fmt: skip
DECIDE = (
    "if self.flag:\n    {s}", "if SWITCH:\n    {s}", "if Settings.on:\n    {s}", 'if CONFIG["by"] == 1.0:\n    {s}',
    "if self.training:\n    {s}", "if z is not None:\n    {h} = {h} + z", "if self.nothing is None:\n    {s}",
    'if hasattr(self, "extra"):\n    {h} = self.extra({h})', '{o} = {h} * getattr(self, "scale", 1.0)',
    'extra = getattr(self, "extra", None)\nif extra is not None:\n    {h} = {h} + extra({h})', "{o} = helper({h})",
    "try:\n    {h} = {h} * self.scale\nexcept AttributeError:\n    {s}", "{o} = closed({h})", "{o} = helper({h}, 2.0)",
    "if {n}.training:\n    {s}", "if {c}.bias is not None:\n    {s}", "if {h}.shape[1] == 4:\n    {s}",
    "if isinstance({n}, nn.BatchNorm2d):\n    {s}", "if torch.is_grad_enabled():\n    {s}", "{o} = {h} * FACTORS[1]",
    '{o} = {h} * self.options["by"]', "for step in self.steps:\n    {h} = {h} * step", "{o} = self.asks({h})",
    "if self.kind == 1:\n    {s}", "if type(self).kind == 1:\n    {s}", "{o} = {h} * self.factor",
    "if len(self._modules) > 3:\n    {s}", "if {h}.requires_grad:\n    {s}", "if {h}.sum() > 0:\n    {s}",
    '{o} = {h} if "extra" in self._modules else {v}', "if {n}.momentum is None:\n    {s}", "{o} = self.helped({h})",
    "if type({n}) is nn.BatchNorm2d:\n    {s}", "{o} = {h} * self.__class__.kind", "if {n} is {m}:\n    {s}",
    '{o} = {h} * self.__dict__.get("scale", 1.0)', "{o} = {h} * (2 if {n}.weight is {m}.weight else 1)",
    "for child in self.children():\n    {h} = {h} * (1.5 if isinstance(child, nn.ReLU) else 1)",
    '{o} = {h} * getattr(type(self), "scale", 1.0)', "if {c}.weight.shape[2] == 3:\n    {s}",
    '{o} = {h} * (2 if hasattr(Settings, "more") else 1)', "{o} = {h} * PLACE.by", "{o} = PARTIAL({h})",
    "{o} = ACTS[{n}.training]({h})", "{o} = {h} * max(self.steps)", "{o} = {h} * globals().get('FACTOR', 1)",
    "{o} = {h} * (2 if torch.is_inference_mode_enabled() else 1)", "{o} = {h} * x.shape[0]",
    "for name, child in self.named_children():\n    {h} = {h} + 0.5 * name.startswith('conv')",
)  # fmt: skip
WITHIN = (
    "with torch.no_grad():\n    {s}", 'with torch.autocast("cpu", enabled=False):\n    {s}',
    "with torch.enable_grad():\n    {s}", 'with torch.autocast("cpu", torch.bfloat16):\n    {s}',
)  # fmt: skip
EFFECT = (
    "self.count += 1", "self.outputs.append({h})", "KEPT.append({h})", "{n}.momentum = 0.3", "switch()",
    "self.outputs[:] = [{h}]",
)  # fmt: skip
LETTERS = (("c", "conv", CONVS), ("n", "norm", NORMS), ("m", "norm", NORMS), ("r", "relu", RELUS))
CALL = (
    "{o} = child({h})",
    "{o} = child({h})",
    "{o} = child({h}, {v})",
    "{o} = child({h}, z=z)",
    "{o} = child(child({h}))",
)
ORDINARY = (CONVOLVE, NORMALIZE, RECTIFY, ADD, SCALE)
ODD = (WRITE, WRITE, STATISTICS, MIX, DECIDE, DECIDE, WITHIN, EFFECT)
TIES = (
    "self.conv1.weight = self.conv0.weight", "self.norm1 = self.norm0", "self.conv1 = self.conv0",
    "self.norm1.running_mean = self.norm0.running_mean", "self.norm1.weight = self.norm0.weight",
)  # fmt: skip


@dataclass
class _Class:
    """One that is being written. tensors: names in forward; the last is the latest."""

    name: str
    members: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=lambda: ["x"])
    inner: list["_Class"] = field(default_factory=list)  # its children's
    ties: list[str] = field(default_factory=list)
    returned: str = ""

    def text(self) -> str:
        body = "\n".join(self.lines)
        used = [text for name, text in MEMBERS.items() if re.search(rf"self\.{name}\b", body)]
        init = ["super().__init__()", *used, *(f"self.{name} = {text}" for name, text in self.members.items())]
        init += self.ties
        methods = {"kind": "kind = 1", "factor": "@property\ndef factor(self):\n    return 2.0"}
        methods["helped"] = "def helped(self, y):\n    return helper(y) * 2"
        parts = [text for name, text in methods.items() if re.search(rf"\.{name}\b", body)]
        parts += [f"def __init__(self):\n{_indented(init)}"]
        parts += [f"def forward(self, x, z=None):\n{_indented([*self.lines, f'return {self.returned}'])}"]
        return f"class {self.name}(nn.Module):\n" + _indented(["\n\n".join(parts)])


def _indented(lines):
    text = "\n".join(lines)
    return "\n".join(f"    {line}" if line else line for line in text.splitlines())


@st.composite
def forwards(draw) -> str:
    """The text of a Python module with a class Net and functions change_0(model), ... that return the changed model."""
    net = _Class("Net")
    _write(draw, net, draw(st.integers(1, 4)))
    body = "\n\n\n".join(cls.text() for cls in (*net.inner, net))
    members = [*net.members.items()]
    members += [(f"{cls.name.lower()}.{name}", made) for cls in net.inner for name, made in cls.members.items()]
    drawn = enumerate(draw(changes(members, body)))
    return module_of([body, *(f"def change_{i}(model):\n{_indented([line, 'return model'])}" for i, line in drawn)])


def module_of(parts: list[str]) -> str:
    """The text of a module of these, with the imports and globals that they need."""
    text, needed = "\n\n\n".join(parts), {}
    for _ in range(2):  # some need others
        for name, definition in GLOBALS.items():
            if re.search(rf"\b{name}\b", "\n".join([text, *needed.values()])):
                needed[name] = definition
    return "\n\n\n".join([HEAD, *(GLOBALS[name] for name in GLOBALS if name in needed), text]) + "\n"


def _write(draw, cls, chains):
    for _ in range(chains):
        kind = draw(st.sampled_from(["chain"] * 6 + ["sequential", "list", "child"]))
        if kind == "child" and cls.name == "Net":
            child = _Class(f"Child{len(cls.inner)}")
            _write(draw, child, 1)
            cls.inner.append(child)
            cls.members[child.name.lower()] = f"{child.name}()"
            _line(draw, cls, draw(st.sampled_from(CALL)).replace("child", f"self.{child.name.lower()}"))
            _tail(draw, cls)
        elif kind in ("sequential", "list"):
            items = [_module(draw, cls, kinds) for kinds in _kinds(draw)]
            holder = "nn.Sequential({})" if kind == "sequential" else "nn.ModuleList([{}])"
            name = f"{'body' if kind == 'sequential' else 'layers'}{len(cls.members)}"
            cls.members[name] = holder.format(", ".join(items))
            if kind == "sequential":
                _line(draw, cls, f"{{o}} = self.{name}({{h}})")
            else:
                _line(draw, cls, f"for layer in self.{name}:\n    {{h}} = layer({{h}})")
            _tail(draw, cls)
        else:
            _line(draw, cls, CONVOLVE[0])
            if draw(st.integers(0, 4)) == 4:
                _line(draw, cls, draw(st.sampled_from(draw(st.sampled_from((ADD, SCALE))))))
            _odd(draw, cls)
            _line(draw, cls, NORMALIZE[0])
            _tail(draw, cls)
    tie = draw(st.none() | st.none() | st.sampled_from(TIES))
    if tie and all(name in cls.members for name in re.findall(r"(?<=self\.)\w+", tie)):
        cls.ties.append(tie)
    h, v = cls.tensors[-1], draw(st.sampled_from(cls.tensors))
    cls.returned = draw(st.sampled_from([h, h, f"{h}, {v}"])) if cls.name == "Net" else h


def _kinds(draw):
    return draw(
        st.sampled_from([(CONVS, NORMS, RELUS), (CONVS, NORMS), (NORMS, RELUS), (NORMS, RELUS, CONVS), (CONVS,)])
    )


def _module(draw, cls, kinds):
    """One that is made there, or one that is there already, by another name."""
    prefix = {CONVS: "conv", NORMS: "norm", RELUS: "relu"}[kinds]
    known = [name for name in cls.members if name.startswith(prefix)]
    if known and draw(st.integers(0, 5)) == 5:
        return f"self.{draw(st.sampled_from(known))}"
    return draw(st.sampled_from(kinds))


def _tail(draw, cls):
    """What may follow a norm."""
    for kinds in draw(st.sampled_from([(RECTIFY,), (), (ADD, RECTIFY), (ADD,), (SCALE, ADD, RECTIFY), (RECTIFY, ADD)])):
        _odd(draw, cls)
        _line(draw, cls, draw(st.sampled_from(kinds)))


def _odd(draw, cls):
    if draw(st.integers(0, 3)) == 3:
        _line(draw, cls, draw(st.sampled_from(draw(st.sampled_from(ODD)))), keep=draw(st.booleans()))


def _line(draw, cls, template, keep=False):
    """keep: the latest tensor stays the latest, whatever the line makes."""
    while "{s}" in template:
        inner = draw(st.sampled_from(draw(st.sampled_from((*ORDINARY, MIX)))))
        inner = inner.replace("{o}", "{h}").replace("\n", "; ")  # what a branch makes need not be there
        template = template.replace("{s}", inner)
    latest = cls.tensors[-1]
    names = {"h": latest, "v": draw(st.sampled_from(cls.tensors))}
    for letter, prefix, kinds in LETTERS:
        if f"{{{letter}}}" in template:
            names[letter] = f"self.{_member(draw, cls, prefix, kinds)}"
    if "{o}" in template:
        new = draw(st.integers(0, 2)) > 0 and not keep
        names["o"] = f"h{len(cls.tensors)}" if new or keep else latest
        if names["o"] not in cls.tensors:
            cls.tensors.insert(-1 if keep else len(cls.tensors), names["o"])
    cls.lines.append(template.format(**names))


def _member(draw, cls, prefix, kinds):
    known = [name for name in cls.members if name.startswith(prefix)]
    if known and draw(st.integers(0, 4)) == 4:
        return draw(st.sampled_from(known))
    name = f"{prefix}{len(known)}"
    cls.members[name] = draw(st.sampled_from(kinds))
    return name
