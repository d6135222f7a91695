"""Whether every device-library function a compiled kernel calls exists: hivmc would find out only when it links.

bishengir declares the functions it calls (``func.func private``) without looking whether the device library has them.
The library ships beside it as LLVM bitcode, one file per core type. Its names are read here from the bitcode itself
(LLVM's Bitcode File Format: bitstream, MODULE_BLOCK, FUNCTION records, STRTAB_BLOCK), because the library of c310 is
written by an LLVM whose other records LLVM 19 refuses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from v4c.errors import Error


class BitcodeError(Error):
    """A file that is not LLVM bitcode with a string table."""


@dataclass(frozen=True)
class Missing:
    """A function that a kernel calls and no device library defines; `core` is ``AIC`` or ``AIV``."""

    name: str
    core: str


_DECLARATION = re.compile(r"func\.func private @(\w+)\(.*?func_core_type<(\w+)>", re.S)
_WRAPPER = "_mlir_ciface_"  # MLIR's prefix of functions that take memrefs by pointer
_LIBRARY = re.compile(r'hivm\.(mix_)?(ai[cv])_bitcode = #hivm\.\w+<"([^"]+)">')


def missing_functions(final: str) -> list[Missing]:
    """Functions that HIVM text as handed to hivmc declares and its libraries (named in the text) do not define."""
    libraries: dict[str, set[str]] = {"AIC": set(), "AIV": set()}
    for _, core, path in _LIBRARY.findall(final):
        libraries[core.upper()] |= _library(Path(path), "c310" if "dav-c310" in final else "c220")
    if not all(libraries.values()):
        raise BitcodeError(
            "HIVM text names no device library for " + " and ".join(c for c, n in libraries.items() if not n)
        )
    missing = []
    for line in final.splitlines():
        found = _DECLARATION.search(line)
        if found is None:
            continue
        name, core = found[1], found[2]
        accepted = [libraries[core]] if core in libraries else list(libraries.values())
        wrapped = "llvm.emit_c_interface" in line and not name.startswith(_WRAPPER)
        symbol = _WRAPPER + name if wrapped else name
        if not any(symbol in names for names in accepted):
            missing.append(Missing(name, core))
    return missing


def _library(path: Path, architecture: str) -> frozenset[str]:
    """Functions of the library named in the text and, where that is built for several architectures, of its own too.

    HIVM for 910B names ``meta_op.aiv.bc``, beside which lies ``meta_op.aiv.c220.bc``; each has functions the other
    lacks, and which of them hivmc links is not documented: a call must be in both.
    """
    functions = defined_functions(path)
    own = path.with_name(f"{path.stem}.{architecture}.bc")
    return functions & defined_functions(own) if own.is_file() else functions


_MODULE, _STRTAB = 8, 23
_FUNCTION_RECORD, _BLOB_RECORD = 8, 1


@functools.cache
def defined_functions(path: Path) -> frozenset[str]:
    """Names of the functions a bitcode file defines; declarations are left out. BitcodeError names the file."""
    try:
        words = path.read_bytes()
    except OSError as error:
        raise BitcodeError(f"{path}: {error.strerror}") from None
    if words[:4] == b"\xde\xc0\x17\x0b":  # the wrapper some linkers add: offset and size of the bitcode follow
        start, size = (int.from_bytes(words[i : i + 4], "little") for i in (8, 12))
        words = words[start : start + size]
    if words[:4] != b"BC\xc0\xde":
        raise BitcodeError(f"{path}: expected LLVM bitcode, found {words[:4].hex()}")
    spans: list[tuple[int, int]] = []
    table = b""
    try:
        for block, code, record in _Bitstream(words).top_records():
            if block == _MODULE and code == _FUNCTION_RECORD and isinstance(record, list) and not record[4]:
                spans.append((record[0], record[1]))  # v2: [strtab offset, size, type, cc, isproto, ...]
            elif block == _STRTAB and code == _BLOB_RECORD and isinstance(record, bytes):
                table = record
    except (IndexError, KeyError) as error:
        raise BitcodeError(f"{path}: damaged bitcode ({error})") from None
    if not table or not spans:
        raise BitcodeError(f"{path}: expected functions and a string table, found {len(spans)} and {len(table)} bytes")
    return frozenset(table[start : start + size].decode(errors="replace") for start, size in spans)


_Abbreviation = list[tuple[str, int]]


class _Bitstream:
    """A reader of LLVM bitstreams that steps over nested blocks."""

    def __init__(self, data: bytes) -> None:
        self.data, self.bit = data, 32  # past the magic

    def fixed(self, width: int) -> int:
        start, end = self.bit >> 3, (self.bit + width + 7) >> 3
        if end > len(self.data):
            raise IndexError("ends early")
        value = int.from_bytes(self.data[start:end], "little") >> (self.bit & 7)
        self.bit += width
        return value & ((1 << width) - 1)

    def variable(self, width: int) -> int:
        value = shift = 0
        more = 1 << (width - 1)
        while True:
            chunk = self.fixed(width)
            value |= (chunk & (more - 1)) << shift
            shift += width - 1
            if not chunk & more:
                return value

    def align(self) -> None:
        self.bit = (self.bit + 31) & ~31

    def top_records(self) -> Iterator[tuple[int, int, list[int] | bytes]]:
        """(block id, code, values) of every record directly in a top-level block."""
        while self.bit + 64 <= 8 * len(self.data):
            if self.fixed(2) != 1:
                return  # padding after the last block
            block = self.variable(8)
            width = self.variable(4)
            self.align()
            size = self.fixed(32)
            end = self.bit + 32 * size
            if block in (_MODULE, _STRTAB):
                yield from ((block, code, record) for code, record in self._records(width))
            self.bit = end

    def _records(self, width: int) -> Iterator[tuple[int, list[int] | bytes]]:
        abbreviations: dict[int, _Abbreviation] = {}
        while True:
            kind = self.fixed(width)
            if kind == 0:  # END_BLOCK
                return
            if kind == 1:  # ENTER_SUBBLOCK
                self.variable(8)
                self.variable(4)
                self.align()
                size = self.fixed(32)
                self.bit += 32 * size
            elif kind == 2:  # DEFINE_ABBREV
                abbreviations[4 + len(abbreviations)] = self._abbreviation()
            elif kind == 3:  # UNABBREV_RECORD
                code = self.variable(6)
                yield code, [self.variable(6) for _ in range(self.variable(6))]
            else:
                yield self._abbreviated(abbreviations[kind])

    def _abbreviation(self) -> _Abbreviation:
        encodings = {1: "fixed", 2: "variable", 3: "array", 4: "char6", 5: "blob"}
        operands: _Abbreviation = []
        for _ in range(self.variable(5)):
            if self.fixed(1):
                operands.append(("literal", self.variable(8)))
            else:
                encoding = encodings[self.fixed(3)]
                operands.append((encoding, self.variable(5) if encoding in ("fixed", "variable") else 0))
        return operands

    def _abbreviated(self, operands: _Abbreviation) -> tuple[int, list[int] | bytes]:
        values: list[int] = []
        for i, (encoding, argument) in enumerate(operands):
            if encoding == "array":
                element = operands[i + 1]
                values += [self._scalar(*element) for _ in range(self.variable(6))]
                break
            if encoding == "blob":
                size = self.variable(6)
                self.align()
                start = self.bit >> 3
                self.bit += 8 * size
                self.align()
                return values[0], self.data[start : start + size]
            values.append(self._scalar(encoding, argument))
        return values[0], values[1:]

    def _scalar(self, encoding: str, argument: int) -> int:
        if encoding == "literal":
            return argument
        if encoding == "char6":
            return self.fixed(6)
        # A width of 0 stands for a value that is always 0.
        return (self.fixed if encoding == "fixed" else self.variable)(argument) if argument else 0
