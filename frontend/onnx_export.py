"""Assembles the traced parts into one ONNX model and writes it, with or without weights.

The main graph is a list of calls: embed, one call per layer, head. Weights are initializers in an external data file
(or graph inputs when left out); caches are ``past.*`` inputs and ``present.*`` outputs of equal shape.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from v4c.custom_ops import DOMAIN, OPS, OPSET_VERSION
from v4c.custom_ops.base import ONNX_OPSET
from v4c.errors import OutputError
from v4c.progress import Progress

from .config import ModelConfig
from .model.caches import CacheSpec, model_caches
from .model.model import WeightSource, checkpoint_name, rope_kind
from .names import TensorInfo, mtp_specs, tensor_specs
from .rope import inv_freq
from .trace import PART_DOMAIN, Part, layer_kind, trace_embedding, trace_head, trace_layer

WEIGHT_DTYPES = {"f32": ir.DataType.FLOAT, "bf16": ir.DataType.BFLOAT16, "f16": ir.DataType.FLOAT16}
_IR_TYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64}
_NUMPY_TYPES = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.INT64: np.int64,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
    ir.DataType.FLOAT16: np.float16,
}


def cache_shape(spec: CacheSpec) -> list[str | int]:
    """Shape of a cache in symbols: ``batch``, ``rows4``-like capacities, fixed widths."""
    rows: str | int = f"rows{spec.ratio}" if spec.ratio else spec.rows
    return ["batch", rows] if spec.width is None else ["batch", rows, spec.width]


class Assembler:
    """Builds a main graph: values, weights and calls."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        self.config, self.dtype = config, WEIGHT_DTYPES[dtype]
        self.specs = tensor_specs(config) | mtp_specs(config)
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.weights: dict[str, ir.Value] = {}
        self._float_weights: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def weight(self, name: str) -> ir.Value:
        """The value of a checkpoint tensor as the parts take it: float32 (cast from its stored dtype) or int64."""
        if name in self._float_weights:
            return self._float_weights[name]
        info = self.specs[name]
        dtype = stored_dtype(name, info, self.dtype)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(info.shape))
        self.weights[name] = value
        if dtype not in (ir.DataType.FLOAT, ir.DataType.INT64):
            value = self.emit("Cast", "", [value], {"to": ir.DataType.FLOAT}, [f"{name}.float"])[0]
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(info.shape)
        self._float_weights[name] = value
        return value

    def emit(
        self, op: str, domain: str, inputs: list[ir.Value], attributes: dict[str, Any], outputs: list[str]
    ) -> list[ir.Value]:
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=len(outputs), name=outputs[0])
        for value, name in zip(node.outputs, outputs, strict=True):
            value.name = name
        self.nodes.append(node)
        return list(node.outputs)

    def call(
        self, part: Part, prefix: str, values: dict[str, ir.Value], outputs: list[str],
        stored: Callable[[str], str] = checkpoint_name,
    ) -> list[ir.Value]:  # fmt: skip
        """Call a part: its activations and caches from `values`, its weights by checkpoint name under `prefix`."""
        arguments = [values[n] for n in part.inputs] + [self.weight(stored(prefix + w)) for w in part.weights]
        return self.emit(part.function.name, PART_DOMAIN, arguments, {}, outputs)

    def finish(
        self, parts: Iterable[Part], outputs: list[ir.Value], constants: Iterable[ir.Value], caches: list[CacheSpec]
    ) -> ir.Model:
        """The model: its graph gives `outputs`; weights are inputs without data."""
        functions = [p.function for p in parts]
        functions += op_functions(functions)
        opsets = {"": ONNX_OPSET, DOMAIN: OPSET_VERSION, PART_DOMAIN: 1}
        for function in functions:
            function.opset_imports.update(opsets)
        main = ir.Graph(
            [*self.inputs, *self.weights.values()],
            outputs,
            nodes=self.nodes,
            initializers=list(constants),
            opset_imports=opsets,
            name="v4",
        )
        described = [{"name": s.path, "dtype": s.dtype, "shape": cache_shape(s)} for s in caches]
        metadata = {
            "v4c.config": json.dumps(self.config.to_dict()),
            "v4c.caches": json.dumps(described),
            "v4c.weights": json.dumps(list(self.weights)),
        }
        return ir.Model(main, ir_version=11, producer_name="v4c", functions=functions, metadata_props=metadata)


def build(
    config: ModelConfig, *, all_logits: bool = False, dtype: str = "f32", progress: Progress | None = None
) -> ir.Model:
    """The ONNX model of `config`, weights as graph inputs without data.

    Args:
        config: the model.
        all_logits: logits ``[batch, chunk, vocab]`` of every token rather than ``[batch, vocab]`` of the last live one.
        dtype: storage of the weight matrices: ``f32``, ``bf16`` or ``f16``; arithmetic is float32.
        progress: told of each traced part.
    """
    kinds = {layer_kind(config, i): i for i in reversed(range(config.num_hidden_layers))}
    parts: dict[str, Part] = {}
    for step, (kind, layer) in enumerate(kinds.items()):
        if progress:
            progress(f"trace {kind}", step, len(kinds) + 2)
        parts[kind] = trace_layer(config, layer)
    if progress:
        progress("trace embedding and head", len(kinds), len(kinds) + 2)
    embed, head = trace_embedding(config), trace_head(config, all_logits)

    graph = Assembler(config, dtype)
    common = {
        "input_ids": graph.input("input_ids", ir.DataType.INT64, ["batch", "chunk"]),
        "positions": graph.input("positions", ir.DataType.INT64, ["batch"]),
        "lengths": graph.input("lengths", ir.DataType.INT64, ["batch"]),
    }
    past = {s.path: graph.input(f"past.{s.path}", _IR_TYPES[s.dtype], cache_shape(s)) for s in model_caches(config)}
    constants = {r: constant(f"rope.{r}.inv_freq", inv_freq(config, r)) for r in ("main", "compress")}
    streams_type = ir.TensorType(ir.DataType.FLOAT)
    streams_shape: list[str | int] = ["batch", "chunk", config.hc_mult, config.hidden_size]

    (streams,) = graph.call(embed, "embed_tokens.", common, ["embed_tokens"])
    present: list[ir.Value] = []
    for layer in range(config.num_hidden_layers):
        streams.type, streams.shape = streams_type, ir.Shape(streams_shape)
        part = parts[layer_kind(config, layer)]
        own = [s for s in model_caches(config) if s.layer == layer]
        values = common | {s.name: past[s.path] for s in own}
        values |= {"streams": streams, "inv_freq": constants[rope_kind(config, layer)]}
        if "engram_lookup" in part.inputs:
            values["engram_lookup"] = graph.weight("model.engram_lookup")
        outputs = [f"layers.{layer}", *(f"present.{s.path}" for s in own)]
        streams, *updated = graph.call(part, f"layers.{layer}.", values, outputs)
        for spec, value in zip(own, updated, strict=True):
            value.type, value.shape = ir.TensorType(_IR_TYPES[spec.dtype]), ir.Shape(cache_shape(spec))
        present += updated
    streams.type, streams.shape = streams_type, ir.Shape(streams_shape)
    (logits,) = graph.call(head, "head.", {"streams": streams, **common}, ["logits"])
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    logits.shape = _logits_shape(config.vocab_size, all_logits)

    if progress:
        progress("trace", len(kinds) + 2, len(kinds) + 2)
    return graph.finish((embed, *parts.values(), head), [logits, *present], constants.values(), model_caches(config))


def add_heads(model: ir.Model, config: ModelConfig) -> None:
    """Give the model both head functions, whichever its last call uses, so that passes see both."""
    for all_logits in (False, True):
        if (PART_DOMAIN, _head_name(all_logits), "") not in model.functions:
            function = trace_head(config, all_logits).function
            function.opset_imports.update(model.opset_imports)
            model.functions[function.identifier()] = function


def set_head(model: ir.Model, all_logits: bool) -> None:
    """Make the last call the head that gives the last live token's logits, or every token's; see `add_heads`."""
    call = _head_call(model)
    call.op_type = _head_name(all_logits)
    assert call.outputs[0].shape is not None
    call.outputs[0].shape = _logits_shape(int(call.outputs[0].shape[-1]), all_logits)  # type: ignore[arg-type]


def add_streams(model: ir.Model) -> None:
    """Make the streams ``[batch, chunk, M, D]`` before the head the second output, which an MTP layer takes."""
    streams = _head_call(model).inputs[0]
    assert streams is not None
    model.graph.outputs.insert(1, streams)


def _head_call(model: ir.Model) -> ir.Node:
    names = [_head_name(all_logits) for all_logits in (False, True)]
    (call,) = (n for n in model.graph if n.domain == PART_DOMAIN and n.op_type in names)
    return call


def _head_name(all_logits: bool) -> str:
    return "HeadAll" if all_logits else "Head"


def _logits_shape(vocab_size: int, all_logits: bool) -> ir.Shape:
    return ir.Shape(["batch", *(["chunk"] if all_logits else []), vocab_size])


def check_destination(path: Path) -> None:
    """Refuse, before any work is done, a destination that is a folder or in no folder; a file there is replaced."""
    if path.is_dir():
        raise OutputError(f"{path}: expected a file name, found a folder")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: expected an existing folder {path.parent}, found none")


def constant(name: str, array: np.ndarray) -> ir.Value:
    """An initializer of the main graph."""
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)


def op_functions(graphs: Iterable[ir.Graph | ir.Function]) -> list[ir.Function]:
    """Bodies of the custom ops that these graphs call, with their helpers."""
    used = {node.op_type for graph in graphs for node in graph if node.domain == DOMAIN}
    protos = {f.name: f for op in OPS.values() if op.name in used for f in op.functions}
    return [ir.from_proto(f.to_function_proto()) for f in protos.values()]


def stored_dtype(name: str, info: TensorInfo, matrix_dtype: ir.DataType) -> ir.DataType:
    """What a tensor is stored as: int64 tables and fp32-always tensors as they are, matrices in `matrix_dtype`.

    A router's matrix stays float32: rounding it would change which experts are chosen.
    """
    if info.kind == "int64":
        return ir.DataType.INT64
    return ir.DataType.FLOAT if info.kind == "fp32" or name.endswith("mlp.gate.weight") else matrix_dtype


def attach_weights(model: ir.Model, source: WeightSource, progress: Progress | None = None) -> None:
    """Turn the weight inputs into initializers whose data is read from `source`, one tensor at a time, when saved."""
    names = set(json.loads(model.metadata_props["v4c.weights"]))
    values = {str(v.name): v for v in model.graph.inputs if v.name in names}
    for name, value in values.items():
        model.graph.inputs.remove(value)
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = _lazy(source, name, value.dtype, value.shape, progress)
        model.graph.register_initializer(value)


def _lazy(source: WeightSource, name: str, dtype: ir.DataType, shape: Any, progress: Progress | None) -> ir.LazyTensor:
    def read() -> ir.Tensor:
        array = source.load(name, None if dtype == ir.DataType.INT64 else "f32")
        if progress:
            progress(f"write {name}", 0, 0)
        return ir.Tensor(np.ascontiguousarray(array.astype(_NUMPY_TYPES[dtype], copy=False)), dtype=dtype, name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=shape, name=name, cache=False)


def save(model: ir.Model, path: Path) -> None:
    """Write ``FILE.onnx`` and, where it has weights, ``FILE.onnx.data`` beside it; both appear only when complete.

    Raises:
        OutputError: the folder does not exist or cannot be written, or the disk is full.
    """
    data_name = path.name + ".data"
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            # Small tensors stay inside: a reader of the graph needs the constants, not the data file.
            ir.save(model, Path(folder) / path.name, external_data=data_name, size_threshold_bytes=1024)
            for name in (data_name, path.name):
                written = Path(folder) / name
                if written.exists() and written.stat().st_size > 0:  # no weights leave an empty data file
                    with written.open("rb") as file:
                        os.fsync(file.fileno())
                    written.replace(path.parent / name)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
