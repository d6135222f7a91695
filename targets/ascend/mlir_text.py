"""Reads MLIR in its generic form (``--mlir-print-op-generic``), whatever the dialects: one syntax for every operation.

bishengir prints its HIVM this way at the stage the sanity checks and the simulator look at. Attributes and types stay
text; the few that are asked for are read by the functions at the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from v4c.errors import Error


class MLIRTextError(Error):
    """Text that is not MLIR in generic form."""


@dataclass(eq=False)
class Operation:
    """One operation; values are their names, such as ``%3`` or ``%3#1``."""

    name: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    attributes: dict[str, str]
    regions: tuple[tuple[Block, ...], ...]
    operand_types: tuple[str, ...]
    result_types: tuple[str, ...]

    def walk(self) -> Iterator[Operation]:
        """This operation and every one inside it, as they stand in the text."""
        yield self
        for region in self.regions:
            for block in region:
                for operation in block.operations:
                    yield from operation.walk()

    def segments(self) -> list[tuple[str, ...]]:
        """Operands by the groups of ``operandSegmentSizes``; one group where there are none."""
        text = self.attributes.get("operandSegmentSizes")
        if text is None:
            return [self.operands]
        groups, start = [], 0
        for size in integers(text):
            groups.append(self.operands[start : start + size])
            start += size
        return groups


@dataclass(eq=False)
class Block:
    """A block: label (empty for an entry block without one), arguments with their types, operations."""

    label: str = ""
    arguments: list[tuple[str, str]] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


@dataclass(frozen=True)
class Module:
    """A parsed module: its operation, and the attribute aliases (``#map``) defined above it."""

    operation: Operation
    aliases: dict[str, str]

    @property
    def functions(self) -> dict[str, Operation]:
        """Functions with a body, by name."""
        found = {}
        for operation in self.operation.regions[0][0].operations:
            if operation.name == "func.func" and operation.regions and operation.regions[0]:
                found[string(operation.attributes["sym_name"])] = operation
        return found


_NAME = re.compile(r'"([^"\\]*)"')
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_RESULTS = re.compile(r"(%[\w$.-]+)(?::(\d+))?\s*=\s*")
_SPACE = re.compile(r"(?:\s+|//[^\n]*)*")
_LABEL = re.compile(r"\^[\w$.-]+")
_KEY = re.compile(r'"[^"]*"|[\w$.]+')
_OPEN, _CLOSE = "([{<", ")]}>"


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def peek(self, token: str) -> bool:
        self.space()
        return self.text.startswith(token, self.at)

    def take(self, token: str) -> bool:
        if not self.peek(token):
            return False
        self.at += len(token)
        return True

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.error(f"expected {token!r}")

    def error(self, what: str) -> MLIRTextError:
        line = self.text.count("\n", 0, self.at) + 1
        return MLIRTextError(f"MLIR text, line {line}: {what}, found {self.text[self.at : self.at + 30]!r}")

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.space()
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.error(f"expected {what}")
        self.at = found.end()
        return found.group()

    def balanced(self, stops: str) -> str:
        """Text up to one of `stops` outside all brackets and strings; the stop is left."""
        self.space()
        text, start, depth = self.text, self.at, 0
        while self.at < len(text):
            char = text[self.at]
            if char == '"':
                self.at += 1
                while self.at < len(text) and text[self.at] != '"':
                    self.at += 2 if text[self.at] == "\\" else 1
                if self.at >= len(text):
                    break
            elif char == "-" and text.startswith("->", self.at):
                self.at += 1
            elif depth == 0 and char in stops:
                return text[start : self.at].strip()
            elif char in _OPEN:
                depth += 1
            elif char in _CLOSE:
                depth -= 1
            self.at += 1
        raise self.error("unclosed bracket")

    def attributes(self) -> dict[str, str]:
        """Entries up to ``}``, which is consumed."""
        entries: dict[str, str] = {}
        while not self.take("}"):
            key = self.match(_KEY, "an attribute name").strip('"')
            entries[key] = self.balanced(",}") if self.take("=") else "unit"
            self.take(",")
        return entries

    def types(self) -> tuple[str, ...]:
        """A type, or types in parentheses."""
        if not self.take("("):
            return (self.balanced(" \n,)"),)
        found = []
        while not self.take(")"):
            found.append(self.balanced(",)"))
            self.take(",")
        return tuple(found)

    def operation(self) -> Operation:
        self.space()
        results: tuple[str, ...] = ()
        if (found := _RESULTS.match(self.text, self.at)) is not None:
            self.at = found.end()
            name, count = found[1], int(found[2] or 1)
            results = (name,) if found[2] is None else tuple(f"{name}#{i}" for i in range(count))
        name = self.match(_NAME, "an operation's name in quotes")[1:-1]
        self.expect("(")
        operands = []
        while not self.take(")"):
            operands.append(self.match(_VALUE, "an operand"))
            self.take(",")
        attributes: dict[str, str] = {}
        if self.take("["):
            attributes["successors"] = self.balanced("]")
            self.expect("]")
        if self.take("<{"):
            attributes |= self.attributes()
            self.expect(">")
        regions = []
        if self.take("("):
            while not self.take(")"):
                regions.append(self.region())
                self.take(",")
        if self.take("{"):
            attributes |= self.attributes()
        self.expect(":")
        operand_types = self.types()
        self.expect("->")
        result_types = self.types()
        return Operation(name, tuple(operands), results, attributes, tuple(regions), operand_types, result_types)

    def region(self) -> tuple[Block, ...]:
        self.expect("{")
        blocks: list[Block] = []
        while not self.take("}"):
            if self.peek("^"):
                block = Block(self.match(_LABEL, "a block's label"))
                if self.take("("):
                    while not self.take(")"):
                        argument = self.match(_VALUE, "a block argument")
                        self.expect(":")
                        block.arguments.append((argument, self.balanced(",)")))
                        self.take(",")
                self.expect(":")
                blocks.append(block)
                continue
            if not blocks:
                blocks.append(Block())
            blocks[-1].operations.append(self.operation())
        return tuple(blocks)


def parse(text: str) -> Module:
    """Parses one module in generic form; MLIRTextError names the line."""
    reader = _Reader(text)
    aliases = {}
    reader.space()
    while reader.peek("#") or reader.peek("!"):
        name = reader.match(re.compile(r"[#!][\w$.]+"), "an alias")
        reader.expect("=")
        aliases[name] = reader.balanced("\n")
        reader.space()
    return Module(reader.operation(), aliases)


_INTEGER = re.compile(r"-?\d+")


def integers(text: str) -> list[int]:
    """Values of ``array<i64: 1, 2>``, ``dense<[1, 2]> : ...`` or ``[[0, 1], [2]]`` (flattened)."""
    body = text.split(":", 1)[1] if text.startswith("array<i") and ":" in text else text
    if text.startswith("array<i") and ":" not in text:
        return []
    return [int(value) for value in _INTEGER.findall(body)]


def reassociation(text: str) -> list[list[int]]:
    """``[[0, 1], [2]]`` as lists; ``[]`` is no group."""
    return [integers(group) for group in re.findall(r"\[([^\[\]]*)\]", text[1:-1])] if text != "[]" else []


def string(text: str) -> str:
    """A string attribute without its quotes."""
    return text[1:-1] if text.startswith('"') else text


def keyword(text: str) -> str:
    """The word inside an enumeration attribute: ``#hivm.pipe<PIPE_V>`` is ``PIPE_V``."""
    found = re.search(r"<\s*([\w.]+)\s*>", text)
    return found[1] if found else text


@dataclass(frozen=True)
class MemRefType:
    """A memref type: extents (None where dynamic), element type, strides (None: contiguous), memory space."""

    shape: tuple[int | None, ...]
    element: str
    space: str

    @property
    def rank(self) -> int:
        return len(self.shape)


_SHAPED = re.compile(r"(?:memref|vector|tensor)<((?:(?:\?|\d+)x)*)([\w]+)")
_SPACED = re.compile(r"#hivm\.address_space<(\w+)>")


def shaped(text: str) -> MemRefType:
    """Reads a memref, vector or tensor type; the space is ``""`` where none is written."""
    found = _SHAPED.match(text)
    if found is None:
        raise MLIRTextError(f"type {text!r}: expected a memref, vector or tensor")
    shape = tuple(None if extent == "?" else int(extent) for extent in found[1].split("x")[:-1])
    space = _SPACED.search(text)
    return MemRefType(shape, found[2], space[1] if space else "")


def memory_space(text: str) -> str:
    """The memory space of a memref type (``gm``, ``ub``, ``cbuf``, ``cc``), or ``""``."""
    space = _SPACED.search(text) if text.startswith("memref") else None
    return space[1] if space else ""
