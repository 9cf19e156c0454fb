"""PTX text to blocks of instructions.

PTX ISA 9.0: chapter 4 (syntax), 9.3 (predicates), 9.7.12 (control flow).
"""

import re
from dataclasses import dataclass, field


class Unsupported(Exception):
    """An instruction, or a form of one, that the emulator does not know."""


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    predicate: str | None  # a register
    negated: bool
    name: str
    modifiers: tuple[str, ...]
    operands: tuple  # strings; a tuple is a {vector}, a list an [address]

    def refused(self, why: str = "") -> Unsupported:
        return Unsupported(f"line {self.line}: {self.text}" + (f": {why}" if why else ""))


@dataclass
class Block:
    """Instructions that run one after the other, and where control goes from there."""

    index: int
    body: list[Instruction] = field(default_factory=list)
    # ("jump", block) | ("branch", register, negated, block, block otherwise) | ("switch", register, *blocks)
    # | ("barrier", next block, barrier, threads or 0 for all) | ("exit",)
    end: tuple = ()


@dataclass
class Program:
    name: str
    parameters: dict[str, tuple[int, int]]  # name: (offset, size) in bytes
    threads: int
    registers: dict[str, tuple[int, int]]  # name: (index, width in bits)
    blocks: list[Block]


def parse(text: str) -> Program:
    """The kernel of a PTX module that has one."""
    head = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\{", text, re.DOTALL)
    threads = re.search(r"\.reqntid (\d+)", text)
    if head is None or threads is None:
        raise Unsupported("a module without a kernel of a known number of threads")
    return _Parser(text, head.end()).program(head.group(1), _parameters(head.group(2)), int(threads.group(1)))


def _parameters(text):
    parameters, offset = {}, 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        name, length = re.search(r"(\w+)(?:\[(\d+)\])?$", declaration).groups()
        kind = re.search(r"\.[usfb](8|16|32|64)\b", declaration)
        size = int(length) if length else int(kind.group(1)) // 8
        alignment = 64 if length else size  # an array is a tensor map
        offset = -(-offset // alignment) * alignment
        parameters[name] = offset, size
        offset += size
    return parameters


class _Parser:
    TABLE = re.compile(r"([\w$]+):\s*\.branchtargets\s+([^;]*);")

    def __init__(self, text, start):
        self._tables = {name: re.split(r"\s*,\s*", labels.strip()) for name, labels in self.TABLE.findall(text)}
        self._lines = self.TABLE.sub(lambda found: "\n" * found[0].count("\n"), text[start:]).splitlines()
        self._first = text[:start].count("\n") + 1
        self._registers = {}
        self._scopes = []  # (number, names that are local to it)
        self._statements = []  # a label, or an instruction

    def program(self, name, parameters, threads) -> Program:
        scopes = 0
        lines = [raw.split("//")[0].strip() for raw in self._lines]
        for index, line in enumerate(lines):
            number = self._first + index
            if line == "{":
                scopes += 1
                self._scopes.append((scopes, _labels(lines[index + 1 :])))
            elif line == "}":
                if not self._scopes:
                    break
                self._scopes.pop()
            else:
                self._line(number, line)
        return Program(name, parameters, threads, self._registers, _blocks(self._statements, self._tables))

    def _line(self, number, line):
        while found := re.match(r"([\w$]+):\s*", line):
            self._statements.append(self._local(found.group(1)) if self._scopes else found.group(1))
            line = line[found.end() :]
        for statement in map(str.strip, line.split(";")):
            if not statement or re.match(r"\.(loc|file|pragma)", statement):
                continue
            if declaration := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement):
                self._declare(*declaration.groups())
            elif statement.startswith("."):
                raise Unsupported(f"line {number}: {statement}")
            else:
                self._statements.append(_instruction(number, self._renamed(statement)))

    def _declare(self, kind, names):
        width = 1 if kind == "pred" else int(kind[1:])
        if found := re.match(r"%(\w+)<(\d+)>", names):
            prefix, count = found.groups()
            declared = [f"%{prefix}{number}" for number in range(int(count))]
        else:
            declared = [self._local(name.strip()) for name in names.split(",")]
        for name in declared:
            self._registers[name] = len(self._registers), width

    def _local(self, name):
        """A name of its scope, told apart from the same one elsewhere."""
        number, names = self._scopes[-1]
        names.add(name)
        return f"{name}#{number}"

    def _renamed(self, statement):
        for number, names in self._scopes:
            for name in names:
                statement = re.sub(rf"(?<![\w$.%]){re.escape(name)}(?![\w$#])", f"{name}#{number}", statement)
        return statement


def _labels(lines):
    """Those of a scope that begins there: they may be jumped to before they stand."""
    labels, depth = set(), 0
    for line in lines:
        depth += (line == "{") - (line == "}")
        if depth < 0:
            break
        if depth == 0 and (found := re.match(r"([\w$]+):", line)):
            labels.add(found.group(1))
    return labels


def _instruction(number, text):
    predicate, negated, rest = None, False, text
    if found := re.match(r"@(!?)([%\w#$]+)\s+", text):
        negated, predicate = bool(found.group(1)), found.group(2)
        rest = text[found.end() :]
    opcode, _, operands = rest.partition(" ")
    name, *modifiers = opcode.split(".")
    return Instruction(number, text, predicate, negated, name, tuple(modifiers), tuple(_operands(operands)))


def _operands(text):
    """Split at the commas that stand in no bracket."""
    parts = re.findall(r"(?:[^,{}\[\]]|\{[^{}]*\}|\[(?:[^\[\]])*\])+", text)
    for part in filter(None, map(str.strip, parts)):
        if part.startswith("{"):
            yield tuple(_operands(part[1:-1]))
        elif part.startswith("["):
            yield list(_operands(part[1:-1]))
        else:
            yield part


def _blocks(statements, tables):
    jumps = [s for s in statements if isinstance(s, Instruction) and s.name == "bra"]
    targets = {s.operands[0] for s in jumps} | {label for labels in tables.values() for label in labels}
    blocks, labels = [Block(0)], {}
    for statement in statements:
        block = blocks[-1]
        if isinstance(statement, str):
            if statement not in targets:
                continue
            if block.body and not block.end:
                block.end = "jump", block.index + 1
        if block.end:
            block = Block(len(blocks))
            blocks.append(block)
        if isinstance(statement, str):
            labels[statement] = block.index
        elif end := _end(statement, block.index + 1, tables):
            block.end = end
        elif (statement.name, *statement.modifiers) != ("bar", "warp", "sync"):
            block.body.append(statement)
    blocks[-1].end = blocks[-1].end or ("exit",)
    for block in blocks:
        block.end = tuple(labels.get(item, item) if isinstance(item, str) else item for item in block.end)
    return blocks


def _end(i: Instruction, following, tables):
    """Where control goes from an instruction that ends a block; nothing for any other."""
    if i.name == "bra":
        return ("branch", i.predicate, i.negated, i.operands[0], following) if i.predicate else ("jump", i.operands[0])
    if i.name not in ("brx", "ret", "exit", "bar", "barrier") or i.modifiers[:1] == ("warp",):
        return ()
    if i.predicate:
        raise i.refused("under a predicate")
    if i.name == "brx":
        return "switch", i.operands[0], *tables[i.operands[1]]
    if i.name in ("ret", "exit"):
        return ("exit",)
    if i.modifiers != ("sync",) and i.modifiers != ("sync", "aligned"):
        raise i.refused()
    barrier, *threads = map(int, i.operands)
    return "barrier", following, barrier, *(threads or [0])
