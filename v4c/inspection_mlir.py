"""What an MLIR file holds: entry points, operations by dialect, caches and weight bytes, read from its text.

Reading needs no MLIR library. It understands what MLIR's printer writes of functions on tensors, and the comment lines
in which v4c describes the model; a tool that rewrites the file drops those, and then only the signatures are known.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from v4c.errors import CheckpointError, Error

_HEADER = re.compile(r"^// v4c\.(\w+) = (.*)$", re.MULTILINE)
_SYMBOL = r'@("[^"\n]*"|[\w.$-]+)'
_FUNCTION = re.compile(rf"^[ \t]*func\.func (?:(public|private|nested) )?{_SYMBOL}\(", re.MULTILINE)
_OPERATION = re.compile(r'^\s*(?:%[^=\n]*= )?"?([a-z_]\w*(?:\.[a-z_][\w.]*)?)"?(?=[ (<]|$)', re.MULTILINE)
_CALL = re.compile(rf"\bcall {_SYMBOL}")
_PARAMETER = re.compile(
    rf"^[ \t]*util\.global [^\n]*{_SYMBOL} = #flow\.parameter\.named<[^\n]*> : (tensor<[^\n]*>)$", re.MULTILINE
)
_TENSOR = re.compile(r"tensor<((?:[\d?]+x)*)([a-z]+\d*[A-Z\d]*\w*)[,>]")
_IMPLIED = {"return": "func.return", "call": "func.call"}  # printed without their dialect inside a function
_DTYPES = {"f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16", "i1": "bool"}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


def describe(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The contents of an MLIR file, and the model's config if v4c exported it.

    Returns:
        ``problem`` (None, or what is missing of the weights), ``entry_points`` (name to ``inputs`` and ``outputs``),
        ``ops`` (dialect to ``{name: {nodes, calls}}``), ``functions`` (private ones, and how often each runs),
        ``caches`` and ``weights``. Nodes are operations in the file, calls how many there are once every function
        call is written out.

    Raises:
        CheckpointError: the file is not MLIR text with a function, or its functions call themselves.
    """
    text = _read(path)
    header = _header(path, text)
    bodies, entry_points = _functions(path, text)
    names = list(header.get("weights", []))
    weights, problem = _weights(path, text, header, entry_points, set(names))
    for entry in entry_points.values():
        entry["inputs"] = [value for value in entry["inputs"] if value["name"] not in set(names)]
    if "main" in entry_points and "inputs" in header:
        problem = _name_dims(path, entry_points["main"], header) or problem
    described = {
        "problem": problem,
        "entry_points": entry_points,
        **_operations(path, bodies, list(entry_points)),
        "caches": header.get("caches", []),
        "weights": weights,
    }
    return described, header.get("config")


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: expected MLIR as text, found bytes that are not UTF-8") from None
    if _FUNCTION.search(text) is None:
        raise CheckpointError(f"{path}: expected MLIR as text, found no func.func")
    return text


def _header(path: Path, text: str) -> dict[str, Any]:
    """What v4c wrote about the model, by key."""
    kinds = {"mlir": dict, "inputs": list, "outputs": list, "caches": list, "weights": list, "config": dict}
    header: dict[str, Any] = {}
    for key, value in _HEADER.findall(text):
        try:
            header[key] = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: comment v4c.{key}: expected JSON, found {error}") from None
        if type(header[key]) is not kinds.get(key):
            raise CheckpointError(f"{path}: comment v4c.{key}: expected a known key and type, found {value[:60]}")
    return header


def _functions(path: Path, text: str) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The text of every function's body, and the signature of every public one."""
    found = list(_FUNCTION.finditer(text))
    bodies, public = {}, {}
    for match, following in zip(found, [*found[1:], None], strict=True):
        name = match[2].strip('"')
        stop = following.start() if following else len(text)
        arguments, after = _balanced(path, text, match.end() - 1)
        signature, _, body = text[after:stop].partition("{\n")
        bodies[name] = body
        if match[1] in (None, "public"):
            inputs = [_value(a) for a in _split(arguments)]
            results = signature.partition("->")[2].strip()
            kinds = _split(_balanced(path, results, 0)[0]) if results.startswith("(") else _split(results)
            public[name] = {"inputs": inputs, "outputs": [_value(kind) for kind in kinds]}
    return bodies, public


def _balanced(path: Path, text: str, start: int) -> tuple[str, int]:
    """What stands between the parenthesis at `start` and the one that closes it, and where the text goes on."""
    depth = 0
    for index, letter in _outside_strings(text, start):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[start + 1 : index], index + 1
    raise CheckpointError(f"{path}: expected MLIR as text, found a parenthesis that is never closed")


def _outside_strings(text: str, start: int) -> Iterator[tuple[int, str]]:
    """Index and character of everything from `start` on that is in no string literal."""
    for match in re.compile(r'"(?:[^"\\\n]|\\.)*"|[^"]|"').finditer(text, start):
        if len(match[0]) == 1:
            yield match.start(), match[0]


def _split(text: str) -> list[str]:
    """Parts between commas that stand outside all brackets."""
    parts, depth, start = [], 0, 0
    for index, letter in _outside_strings(text, 0):
        depth += (letter in "(<[{") - (letter in ")>]}")
        if letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _value(text: str) -> dict[str, Any]:
    """Name, dtype and shape of ``%name: type`` or of a bare type; a dynamic dim is ``?``."""
    name, _, kind = text.partition(": ") if text.startswith("%") else ("", "", text)
    shape, dtype = _shape(kind)
    return {"name": name.removeprefix("%"), "dtype": dtype, "shape": shape}


def _shape(kind: str) -> tuple[list[int | str], str]:
    match = _TENSOR.match(kind)
    element = kind if match is None else match[2]
    dtype = _DTYPES.get(element, f"int{element[1:]}" if re.fullmatch(r"i\d+", element) else element)
    sizes = [] if match is None else match[1].split("x")[:-1]
    return [d if d == "?" else int(d) for d in sizes], dtype


def _name_dims(path: Path, entry: dict[str, Any], header: dict[str, Any]) -> str | None:
    """Give inputs and outputs the names of the header; a line where it does not fit the signature."""
    for side in ("inputs", "outputs"):
        told, found = header[side], entry[side]
        plain = [[d if isinstance(d, int) else "?" for d in value["shape"]] for value in told]
        if plain != [value["shape"] for value in found] or [v["dtype"] for v in told] != [v["dtype"] for v in found]:
            return f"{path}: comment v4c.{side}: expected what @main takes and gives, found other {side}"
        entry[side] = told
    return None


def _operations(path: Path, bodies: dict[str, str], entry_points: list[str]) -> dict[str, Any]:
    counts = {name: _count(body) for name, body in bodies.items()}
    called = {name: Counter(c.strip('"') for c in _CALL.findall(body)) for name, body in bodies.items()}
    open_calls: list[str] = []

    @cache
    def expanded(name: str) -> tuple[Counter[str], Counter[str]]:
        """Operations and functions that one run of `name` reaches."""
        if name in open_calls:
            raise CheckpointError(f"{path}: @{name}: expected no recursion, found a call of itself")
        if name not in bodies:
            raise CheckpointError(f"{path}: expected the function @{name}, found only a call of it")
        open_calls.append(name)
        operations, functions = Counter(counts[name]), Counter(called[name])
        for callee, times in called[name].items():
            for total, inner in zip((operations, functions), expanded(callee), strict=True):
                for key, count in inner.items():
                    total[key] += times * count
        open_calls.pop()
        return operations, functions

    runs, functions = Counter[str](), Counter[str]()
    for name in entry_points:
        operations, reached = expanded(name)
        runs += operations
        functions += reached
    written = sum(counts.values(), Counter[str]())
    dialects: dict[str, dict[str, Any]] = {}
    for name in sorted(written):
        dialects.setdefault(name.split(".")[0], {})[name] = {"nodes": written[name], "calls": runs[name]}
    return {"ops": dialects, "functions": {n: functions[n] for n in bodies if n not in entry_points}}


def _count(body: str) -> Counter[str]:
    names = (_IMPLIED.get(name, name) for name in _OPERATION.findall(body))
    return Counter(name for name in names if "." in name)


def _weights(
    path: Path, text: str, header: dict[str, Any], entry_points: dict[str, dict[str, Any]], names: set[str]
) -> tuple[dict[str, Any], str | None]:
    """Number and bytes of the weights, the file that holds them, and what is missing there."""
    stored = {name.strip('"'): _shape(kind) for name, kind in _PARAMETER.findall(text)}
    arguments = {v["name"]: (v["shape"], v["dtype"]) for e in entry_points.values() for v in e["inputs"]}
    weights = stored or {name: value for name, value in arguments.items() if name in names}
    sizes: Counter[str] = Counter()
    for shape, dtype in weights.values():
        sizes[dtype] += math.prod(d for d in shape if isinstance(d, int)) * _width(dtype)
    file = header.get("mlir", {}).get("weights_file")
    files, problem = {}, None
    if stored and file is not None:
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: comment v4c.mlir: expected the name of a file beside, found {file!r}")
        files[file] = sum(sizes.values())
        problem = _missing(path.parent / file, stored)
    described = {
        "tensors": len(weights),
        "stored": bool(stored),
        "bytes": sum(sizes.values()),
        "bytes_by_dtype": dict(sizes),
        "files": files,
    }
    return described, problem


def _width(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) // 8 if digits else 1


def _missing(file: Path, weights: dict[str, tuple[list[int | str], str]]) -> str | None:
    """A line on the first weight that the safetensors file does not hold as the module wants it."""
    from v4c.frontend.safetensors_reader import read_header

    if not file.is_file():
        return f"{file}: expected {len(weights)} weights, found no such file"
    try:
        tensors = read_header(file)
    except Error as error:
        return str(error)
    for name, (shape, dtype) in weights.items():
        tensor = tensors.get(name)
        found = None if tensor is None else (list(tensor.shape), _STORED.get(tensor.dtype, tensor.dtype))
        if found != (shape, dtype):
            return f"{file}: {name}: expected {dtype} {shape}, found {found and f'{found[1]} {found[0]}'}"
    return None
