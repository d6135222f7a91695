"""What bishengir accepts although it cannot be right: checks on the scheduled HIVM of one tile program.

1. Every argument the tile program's text reads is read on the device, and every one it writes is written: whole
   gathers have been dropped without a word.
2. Index arguments that are loaded element by element are still loaded.
3. Every on-chip buffer has an address.
4. Nothing reads an on-chip buffer that nothing has written.
5. No vector or cube operation works on global memory.
6. Where one core reads what the other writes, a flag goes from the one to the other in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .mlir_text import Module, Operation, keyword, memory_space, parse, shaped, string
from .program import TileProgram

_VIEWS = frozenset(
    (
        "memref.cast",
        "memref.collapse_shape",
        "memref.expand_shape",
        "memref.memory_space_cast",
        "memref.reinterpret_cast",
        "memref.subview",
        "memref.transpose",
        "memref.view",
    )
)
_LOCAL = ("ub", "cbuf", "cc", "ca", "cb")
_MOVES = frozenset(f"hivm.hir.{name}" for name in ("load", "store", "copy", "nd2nz", "nz2nd", "fixpipe"))


@dataclass(frozen=True)
class Access:
    """One operation's use of one memref.

    Attributes:
        operation: its name.
        root: what the memref is a view of: an argument's place (``arg3``), an address (``ub@1024+4096``), or ``alloc``.
        space: memory space.
        place: in the function's text, counted in operations.
    """

    operation: str
    root: str
    space: str
    writes: bool
    place: int


@dataclass
class _Function:
    """What one device function does to memory, in the order of the text, and its cross-core flags."""

    name: str
    core: str
    accesses: list[Access] = field(default_factory=list)
    unplanned: list[str] = field(default_factory=list)
    flags: list[tuple[bool, int, int]] = field(default_factory=list)  # (sets, flag, place)
    kinds: dict[int, str] = field(default_factory=dict)  # of arguments: ffts, lock, workspace, buffer, number


def check_sanity(program: TileProgram, scheduled: str) -> list[str]:
    """Causes for refusing a kernel, each one line; empty when all checks hold. `scheduled` is MLIR in generic form."""
    module = parse(scheduled)
    names = (program.name, f"{program.name}_mix_aic", f"{program.name}_mix_aiv")
    functions = [_read(module, name, f) for name, f in module.functions.items() if name in names]
    if not functions:
        return [f"no device function {program.name} in the scheduled HIVM"]
    causes = [
        *_dropped(program, functions),
        *_unplanned(functions),
        *_unwritten(functions),
        *_global_operands(module, functions),
        *_unsynchronised(functions),
    ]
    return list(dict.fromkeys(causes))


def _read(module: Module, name: str, function: Operation) -> _Function:
    found = _Function(name, keyword(function.attributes.get("hivm.func_core_type", "<AIV>")))
    roots: dict[str, str] = {}
    constants: dict[str, int] = {}
    described = re.findall(r"\{([^{}]*)\}", function.attributes.get("arg_attrs", ""))
    for i, (value, type_text) in enumerate(function.regions[0][0].arguments):
        text = described[i] if i < len(described) else ""
        kind = next((k for k in ("ffts_base_address", "sync_block_lock", "workspace") if k in text), "")
        found.kinds[i] = kind or ("buffer" if type_text.startswith("memref") else "number")
        roots[value] = "workspace" if kind == "workspace" else f"arg{i}"
    for place, operation in enumerate(function.walk()):
        if operation.name == "arith.constant":
            number = operation.attributes["value"].partition(" ")[0]
            if number.lstrip("-").isdigit():
                constants[operation.results[0]] = int(number)
        elif operation.name == "hivm.hir.pointer_cast":
            roots[operation.results[0]] = _planned(operation, constants)
        elif operation.name in ("memref.alloc", "memref.alloca"):
            roots[operation.results[0]] = f"alloc{operation.results[0]}"
            if memory_space(operation.result_types[0]) in _LOCAL:
                found.unplanned.append(operation.result_types[0])
        elif operation.name in _VIEWS:
            source = roots.get(operation.operands[0], "?")
            # Parts of the workspace are told apart by their types: the offsets are computed.
            part = operation.name == "memref.view" and source == "workspace"
            roots[operation.results[0]] = f"workspace {operation.result_types[0]}" if part else source
        elif operation.name == "arith.select" and operation.result_types[0].startswith("memref"):
            roots[operation.results[0]] = roots.get(operation.operands[1], "?")
        elif operation.name in ("hivm.hir.sync_block_set", "hivm.hir.sync_block_wait"):
            flag = int(operation.attributes.get("static_flag_id", "-1").partition(" ")[0])
            found.flags.append((operation.name.endswith("set"), flag, place))
        else:
            for index, writes in _effects(module, operation):
                value, type_text = operation.operands[index], operation.operand_types[index]
                root, space = roots.get(value, "?"), memory_space(type_text)
                found.accesses.append(Access(operation.name, root, space, writes, place))
    return found


def _planned(operation: Operation, constants: dict[str, int]) -> str:
    kind = shaped(operation.result_types[0])
    size = 1
    for extent in kind.shape:
        size *= extent or 1
    bits = int(re.sub(r"\D", "", kind.element.replace("E4M3FN", "").replace("E5M2", "")))
    address = constants.get(operation.operands[0], -1)
    return f"{kind.space}@{address}+{-(-size * bits // 8)}"


def _effects(module: Module, operation: Operation) -> Iterator[tuple[int, bool]]:
    """(operand, whether it is written) for the memrefs an operation uses."""
    name, types = operation.name, operation.operand_types
    memrefs = [i for i, t in enumerate(types) if t.startswith("memref")]
    if name in ("memref.load", "vector.transfer_read"):
        yield 0, False
    elif name in ("memref.store", "vector.transfer_write"):
        yield 1, True
    elif name == "func.call":
        yield from _callee_effects(module, operation)
    elif name.startswith("hivm.hir."):
        groups = operation.segments()
        inputs = len(groups[0]) if len(groups) > 1 else 1
        if name == "hivm.hir.mmadL1":
            yield from ((0, False), (1, False), (memrefs[2], True))
            return
        if name == "hivm.hir.varange":
            yield 0, True
            return
        outputs = len(groups[1]) if len(groups) > 1 else 1
        for i in memrefs:
            if i < inputs:
                yield i, False
            elif i < inputs + outputs:
                yield i, True


def _callee_effects(module: Module, operation: Operation) -> Iterator[tuple[int, bool]]:
    """A vector function's effects on its arguments. A read whose value nothing uses is none."""
    callee = module.functions.get(string(operation.attributes["callee"]).removeprefix("@"))
    if callee is None:
        return
    block = callee.regions[0][0]
    origin = {value: i for i, (value, _) in enumerate(block.arguments)}
    users: dict[str, list[tuple[Operation, int]]] = {}
    for inner in callee.walk():
        for i, value in enumerate(inner.operands):
            users.setdefault(value, []).append((inner, i))

    def matters(value: str, depth: int = 0) -> bool:
        for user, i in users.get(value, ()):
            if user.name in ("vector.shape_cast", "builtin.unrealized_conversion_cast", "vector.extract") and depth < 8:
                if any(matters(result, depth + 1) for result in user.results):
                    return True
            elif not (user.name == "vector.reduction" and i == 1 and "withoutInitMergeOp" in user.attributes):
                return True
        return False

    effects: dict[int, set[bool]] = {}
    for inner in callee.walk():
        if inner.name in _VIEWS and inner.operands[0] in origin:
            origin[inner.results[0]] = origin[inner.operands[0]]
        elif inner.name in ("vector.transfer_read", "memref.load") and inner.operands[0] in origin:
            if matters(inner.results[0]):
                effects.setdefault(origin[inner.operands[0]], set()).add(False)
        elif inner.name in ("vector.transfer_write", "memref.store") and inner.operands[1] in origin:
            effects.setdefault(origin[inner.operands[1]], set()).add(True)
    for index, kinds in effects.items():
        # A buffer the function writes is taken as its own before it reads it.
        for writes in sorted(kinds, reverse=True):
            yield index, writes


def _buffers(program: TileProgram, function: _Function) -> dict[str, int]:
    """The program's arguments by root: ``arg5`` is argument 2."""
    places = [i for i, kind in function.kinds.items() if kind == "buffer"]
    return {f"arg{place}": number for number, place in enumerate(places[: len(program.arguments)])}


def _dropped(program: TileProgram, functions: list[_Function]) -> Iterator[str]:
    used: dict[str, set[bool]] = {}
    for function in functions:
        buffers = _buffers(program, function)
        for access in function.accesses:
            if access.root in buffers:
                used.setdefault(program.arguments[buffers[access.root]].name, set()).add(access.writes)
    read, written, indexed = _uses(program)
    for argument in program.arguments:
        kinds = used.get(argument.name, set())
        if argument.name in read and False not in kinds:
            yield f"dropped input: nothing on the device reads {argument.name}"
        if argument.name in written and True not in kinds:
            yield f"dropped output: nothing on the device writes {argument.name}"
    loaded = {
        program.arguments[buffers[access.root]].name
        for function in functions
        for buffers in [_buffers(program, function)]
        for access in function.accesses
        if access.operation == "memref.load" and access.root in buffers
    }
    if not any("gather" in access.operation for function in functions for access in function.accesses):
        for name in sorted(indexed - loaded):
            yield f"dropped gather: the program loads indices from {name}, the device does not"


_VIEW_LINE = re.compile(
    r"%([\w$.-]+) = memref\.(?:cast|collapse_shape|expand_shape|reinterpret_cast|subview) %([\w$.-]+)"
)
_COPY_LINE = re.compile(r"memref\.copy %([\w$.-]+), %([\w$.-]+)")
_WRITE_LINE = re.compile(r"(?:materialize_in_destination .* in writable|memref\.store %[\w$.-]+,) %([\w$.-]+)")
_INDEX_LINE = re.compile(r"= memref\.load %([\w$.-]+)\[")
_VALUE = re.compile(r"%([\w$.-]+)")


def _uses(program: TileProgram) -> tuple[set[str], set[str], set[str]]:
    """Arguments that the program's own text reads, writes, and loads single elements from (as indices are)."""
    signature = re.search(rf"@{re.escape(program.name)}\((.*?)\)\s*attributes[^\n]*\n", program.text, re.S)
    if signature is None:
        return set(), set(), set()
    values = re.findall(r"%([\w$.-]+): memref<", signature[1])[-len(program.arguments) :] if program.arguments else []
    roots = dict(zip(values, (argument.name for argument in program.arguments), strict=False))
    read: set[str] = set()
    written: set[str] = set()
    indexed: set[str] = set()
    for line in program.text[signature.end() :].splitlines():
        if (view := _VIEW_LINE.search(line)) is not None:
            if view[2] in roots:
                roots[view[1]] = roots[view[2]]
            continue
        if (copy := _COPY_LINE.search(line)) is not None:
            read |= {roots[copy[1]]} if copy[1] in roots else set()
            written |= {roots[copy[2]]} if copy[2] in roots else set()
        elif (write := _WRITE_LINE.search(line)) is not None:
            written |= {roots[write[1]]} if write[1] in roots else set()
        elif (load := _INDEX_LINE.search(line)) is not None:
            if load[1] in roots:
                read.add(roots[load[1]])
                indexed.add(roots[load[1]])
        else:
            read |= {roots[value] for value in _VALUE.findall(line) if value in roots}
    return read, written, indexed


def _unplanned(functions: list[_Function]) -> Iterator[str]:
    for function in functions:
        for type_text in function.unplanned:
            yield f"{function.name}: a buffer without an address: {type_text}"


_ADDRESS = re.compile(r"(\w+)@(-?\d+)\+(\d+)$")


def _unwritten(functions: list[_Function]) -> Iterator[str]:
    """Reads of on-chip bytes that nothing wrote: earlier in the same function, or anywhere in the other core's."""
    for function in functions:
        shared = [
            span
            for other in functions
            if other is not function
            for access in other.accesses
            if access.writes and (span := _span(access.root)) is not None and span[0] in ("ub", "cbuf")
        ]
        written = list(shared)
        unplanned: set[str] = set()
        for access in function.accesses:
            span = _span(access.root)
            if access.root.startswith("alloc"):
                if access.writes:
                    unplanned.add(access.root)
                elif access.root not in unplanned and access.space in _LOCAL:
                    reads = f"{access.operation} reads a buffer in {access.space}"
                    yield f"{function.name}: {reads} that nothing has written"
            elif span is not None and access.writes:
                written.append(span)
            elif span is not None and not any(_overlap(span, other) for other in written):
                yield (
                    f"{function.name}: {access.operation} reads {span[0]} bytes {span[1]} to {span[2]}, "
                    "which nothing has written"
                )


def _span(root: str) -> tuple[str, int, int] | None:
    found = _ADDRESS.match(root)
    if found is None or int(found[2]) < 0:
        return None
    return found[1], int(found[2]), int(found[2]) + int(found[3])


def _overlap(a: tuple[str, int, int], b: tuple[str, int, int]) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def _global_operands(module: Module, functions: list[_Function]) -> Iterator[str]:
    for function in functions:
        for access in function.accesses:
            computes = access.operation.startswith("hivm.hir.") and access.operation not in _MOVES
            if access.space == "gm" and (computes or access.operation == "func.call"):
                yield f"{function.name}: {access.operation} works on global memory ({access.root})"
            if access.space == "gm" and access.operation.startswith("vector.transfer"):
                yield f"{function.name}: {access.operation} works on global memory ({access.root})"


def _unsynchronised(functions: list[_Function]) -> Iterator[str]:
    for writer in functions:
        for reader in functions:
            if writer.core == reader.core:
                continue
            for read in reader.accesses:
                if read.writes or not _is_shared(read):
                    continue
                writes = [w for w in writer.accesses if w.writes and _same(w, read)]
                if not writes and read.root.startswith("workspace"):  # its part is not told apart: any part may be it
                    writes = [w for w in writer.accesses if w.writes and w.root.startswith("workspace")]
                own = [w for w in reader.accesses if w.writes and _same(w, read) and w.place < read.place]
                if not writes or own:
                    continue
                sets = {flag for sets, flag, place in writer.flags if sets and place > min(w.place for w in writes)}
                waits = {flag for sets, flag, place in reader.flags if not sets and place < read.place}
                if not sets & waits:
                    yield (
                        f"missing cross-core sync: {reader.core} reads {_where(read)}, which {writer.core} writes, "
                        "and waits for no flag of it"
                    )


def _is_shared(access: Access) -> bool:
    return access.space == "gm" or _span(access.root) is not None


def _same(write: Access, read: Access) -> bool:
    a, b = _span(write.root), _span(read.root)
    if a is not None and b is not None:
        # L1 and UB of a pair of cores can be written from the other core; the accumulator cannot.
        return a[0] in ("ub", "cbuf") and _overlap(a, b)
    return write.space == "gm" and write.root == read.root


def _where(access: Access) -> str:
    return access.root.partition(" ")[0]
