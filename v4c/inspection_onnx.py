"""What an ONNX file holds: operators counted through the functions that are called, inputs, caches, weight bytes.

Data of the weights is not read, and `onnx` is the only library needed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from v4c.errors import CheckpointError

OPS_DOMAIN = "v4c"
"""Of the custom ops: `v4c.custom_ops.DOMAIN`, which cannot be imported without torch."""

Key = tuple[str, str]
"""Domain and name of an operator or function."""


def describe(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The contents of an ONNX file, and the model's config if v4c exported it.

    Returns:
        ``problem`` (None, or what is missing of the weights), ``producer``, ``ir_version``, ``opsets``, ``custom_ops``,
        ``standard_ops``, ``functions``, ``inputs``, ``outputs``, ``caches`` and ``weights``. Operators come as
        ``{name: {nodes, calls}}``: nodes in the file, and how many there are once every function call is written out.
        A custom op is one node: the bodies that stand in for them elsewhere do not count.

    Raises:
        CheckpointError: the file is not ONNX, or its functions call themselves.
    """
    model = _parse(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    initializers = {tensor.name for tensor in model.graph.initializer}
    weight_names = set(_json(path, metadata, "v4c.weights", list, initializers))
    weights, problem = _weights(path, model, weight_names)
    described = {
        "problem": problem,
        "producer": model.producer_name,
        "ir_version": model.ir_version,
        "opsets": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        **_operators(path, model),
        "inputs": [_value(value) for value in model.graph.input if value.name not in weight_names | initializers],
        "outputs": [_value(value) for value in model.graph.output],
        "caches": _json(path, metadata, "v4c.caches", list, []),
        "weights": weights,
    }
    return described, _json(path, metadata, "v4c.config", dict, None)


def _parse(path: Path) -> ModelProto:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found {error.strerror or error}") from None
    except Exception as error:  # protobuf's error classes depend on its backend
        raise CheckpointError(f"{path}: expected an ONNX model, found {type(error).__name__}: {error}") from None
    if not model.graph.node:
        raise CheckpointError(f"{path}: expected an ONNX model, found no nodes")
    return model


def _json(path: Path, metadata: dict[str, str], key: str, kind: type, default: Any) -> Any:
    if key not in metadata:
        return default
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: metadata {key}: expected JSON, found {error}") from None
    if type(value) is not kind:
        raise CheckpointError(f"{path}: metadata {key}: expected a JSON {kind.__name__}, found {metadata[key][:60]}")
    return value


def _operators(path: Path, model: ModelProto) -> dict[str, Any]:
    functions = {(function.domain, function.name): list(function.node) for function in model.functions}
    functions = {key: nodes for key, nodes in functions.items() if key[0] != OPS_DOMAIN}
    open_calls: list[Key] = []

    @cache
    def expanded(key: Key) -> Counter[Key]:
        if key in open_calls:
            raise CheckpointError(f"{path}: function {key[1]}: expected no recursion, found a call of itself")
        open_calls.append(key)
        counts = expand(functions[key])
        open_calls.pop()
        return counts

    def expand(nodes: Iterable[NodeProto]) -> Counter[Key]:
        """Operators and functions reached from `nodes`, each as often as it runs (a loop's body once)."""
        counts = _count(nodes)
        for key, times in list(counts.items()):
            if key in functions:
                for inner, count in expanded(key).items():
                    counts[inner] += times * count
        return counts

    calls = expand(model.graph.node)
    written = sum(map(_count, functions.values()), _count(model.graph.node))
    operators = {key: {"nodes": written[key], "calls": calls[key]} for key in sorted(written) if key not in functions}
    return {
        "custom_ops": {name: count for (domain, name), count in operators.items() if domain == OPS_DOMAIN},
        "standard_ops": {
            f"{domain}.{name}" if domain else name: count
            for (domain, name), count in operators.items()
            if domain != OPS_DOMAIN
        },
        "functions": {name: calls[domain, name] for domain, name in functions},
    }


def _count(nodes: Iterable[NodeProto]) -> Counter[Key]:
    """Nodes by operator, those of subgraphs (Loop, If) included."""
    counts: Counter[Key] = Counter()
    for node in nodes:
        domain = "" if node.domain == "ai.onnx" else node.domain
        counts[domain, node.op_type] += 1
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                counts += _count(graph.node)
    return counts


def _value(value: ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    return {"name": value.name, "dtype": _dtype_name(tensor.elem_type), "shape": shape}


def _dtype_name(code: int) -> str:
    if code not in TensorProto.DataType.values():
        return f"type {code}"
    name = TensorProto.DataType.Name(code).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _weights(path: Path, model: ModelProto, names: set[str]) -> tuple[dict[str, Any], str | None]:
    """Number and bytes of the weights `names`, the files that hold them, and what is missing there."""
    sizes: Counter[str] = Counter()
    files: dict[str, int] = {}
    stored = 0
    for tensor in model.graph.initializer:
        if tensor.name not in names:
            continue
        stored += 1
        external = {entry.key: entry.value for entry in tensor.external_data}
        nbytes = int(external.get("length", 0)) or len(tensor.raw_data) or _nbytes(tensor.dims, tensor.data_type)
        sizes[_dtype_name(tensor.data_type)] += nbytes
        if "location" in external:
            end = int(external.get("offset", 0)) + nbytes
            files[external["location"]] = max(files.get(external["location"], 0), end)
    for value in model.graph.input:
        if value.name in names:
            tensor_type = value.type.tensor_type
            dims = [dim.dim_value for dim in tensor_type.shape.dim]
            sizes[_dtype_name(tensor_type.elem_type)] += _nbytes(dims, tensor_type.elem_type)
    problem = None
    for name, needed in files.items():
        file = path.parent / name
        found = file.stat().st_size if file.is_file() else 0
        if found < needed:
            problem = f"{file}: expected {needed} bytes of weights, found {found if file.is_file() else 'no such file'}"
    weights = {
        "tensors": len(names),
        "stored": stored == len(names),
        "bytes": sum(sizes.values()),
        "bytes_by_dtype": dict(sizes),
        "files": files,
    }
    return weights, problem


def _nbytes(dims: Iterable[int], dtype: int) -> int:
    return math.prod(dims) * onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize
