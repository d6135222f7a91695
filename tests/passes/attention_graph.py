"""Small graphs around one attention op and their numbers in ONNX Runtime: for the tests of the passes beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.custom_ops.harness import new_session, spec
from v4c.custom_ops import DOMAIN, OPS, TensorSpec
from v4c.custom_ops.base import ONNX_OPSET, OPSET_VERSION

HEADS, WIDTH, WINDOW, RATIO, CHOSEN, CAPACITY, PAIRS = 2, 6, 4, 3, 3, 12, 2
ATTRIBUTES: dict[str, dict[str, int | float]] = {
    "CompressedSparseAttention": {"scale": 0.4},
    "HeavilyCompressedAttention": {"ratio": RATIO, "scale": 0.4},
    "SlidingWindowAttention": {"scale": 0.4},
}
KINDS = sorted(ATTRIBUTES)
SPECS = {
    "q": spec("batch", "chunk", HEADS, WIDTH),
    "kv": spec("batch", "chunk", WIDTH),
    "window": spec("batch", WINDOW, WIDTH),
    "rows": spec("batch", CAPACITY, WIDTH),
    "indices": spec("batch", "chunk", CHOSEN, dtype="int64"),
    "sinks": spec(HEADS),
    "positions": spec("batch", dtype="int64"),
    "lengths": spec("batch", dtype="int64"),
    "inv_freq": spec(PAIRS),
    "kv_norm": spec(WIDTH),
    "other_positions": spec("batch", dtype="int64"),
    "other_freq": spec(PAIRS),
    "out": spec("batch", "chunk", HEADS, WIDTH),
    "window_out": spec("batch", WINDOW, WIDTH),
}
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**32))
"""Batch, chunk and seed."""


def attention(kind: str, *, q: str = "q", kv: str = "kv", out: str = "out") -> onnx.NodeProto:
    """The attention node, its other inputs by their own names."""
    renamed = {"q": q, "kv": kv}
    inputs = [renamed.get(n, n) for n in OPS[kind].inputs]
    node = helper.make_node(kind, inputs, [out, "window_out"], name="attention", domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in ATTRIBUTES[kind].items())
    return node


def rope(x: str, y: str, sign: float, positions: str = "positions", inv_freq: str = "inv_freq") -> onnx.NodeProto:
    """A `TrailingRope` node, named after what it makes."""
    return helper.make_node("TrailingRope", [x, positions, inv_freq], [y], name=y, domain=DOMAIN, sign=sign)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    outputs: Mapping[str, TensorSpec],
    constants: Mapping[str, np.ndarray],
    in_function: bool = False,
) -> ir.Model:
    """The graph of `nodes`; its inputs are all names that nothing makes.

    Args:
        nodes: in order.
        outputs: names and specs.
        constants: initializers, or, in a function, Constant nodes.
        in_function: whether the nodes are the body of a layer function that the graph calls.
    """
    made = {*constants, *(o for n in nodes for o in n.output)}
    names = list(dict.fromkeys(i for n in nodes for i in n.input if i not in made))
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    initializers = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    functions = []
    if in_function:
        stored = [helper.make_node("Constant", [], [t.name], value=t) for t in initializers]
        functions = [helper.make_function("parts", "Layer", names, list(outputs), [*stored, *nodes], opsets)]
        nodes, initializers = [helper.make_node("Layer", names, list(outputs), domain="parts")], []
    graph = helper.make_graph(
        nodes,
        "g",
        [_value(n, SPECS[n]) for n in names],
        [_value(n, s) for n, s in outputs.items()],
        initializers,
    )
    opsets = [*opsets, helper.make_opsetid("parts", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=11, functions=functions))


def operators(model: ir.Model) -> list[str]:
    """Op types of the graph and its layer functions, without constants and calls."""
    graphs = [model.graph, *model.functions.values()]
    return [n.op_type for g in graphs for n in g if n.op_type not in ("Constant", "Layer")]


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    """The only node of `op_type`."""
    (node,) = (n for g in (model.graph, *model.functions.values()) for n in g if n.op_type == op_type)
    return node


def names(values: Sequence[ir.Value | None]) -> list[str | None]:
    """Names of a node's inputs or outputs."""
    return [v.name if v is not None else None for v in values]


def evaluate(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs in ONNX Runtime; custom ops get their bodies."""
    whole = ir.from_proto(ir.to_proto(model))
    used = {n.op_type for g in (whole.graph, *whole.functions.values()) for n in g if n.domain == DOMAIN}
    for function in (f for name in used for f in OPS[name].functions):
        body = ir.from_proto(function.to_function_proto())
        whole.functions[body.identifier()] = body
    return new_session(ir.to_proto(whole)).run(None, {n: feeds[n] for n in names(whole.graph.inputs) if n})


def random_feeds(batch: int, chunk: int, seed: int) -> dict[str, np.ndarray]:
    """A value for every name in `SPECS`: rows of a batch at positions of their own, some of their tokens padding."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": batch, "chunk": chunk}
    feeds = {}
    for name, tensor in SPECS.items():
        shape = [sizes.get(d, d) for d in tensor.shape]
        integers = tensor.dtype == "int64"
        feeds[name] = rng.integers(0, 20, shape) if integers else rng.standard_normal(shape, dtype=np.float32)
    feeds["lengths"] = rng.integers(0, chunk + 1, batch)
    feeds["indices"] = rng.integers(-1, CAPACITY, (batch, chunk, CHOSEN))
    return feeds


def _value(name: str, tensor: TensorSpec) -> onnx.ValueInfoProto:
    kind = TensorProto.INT64 if tensor.dtype == "int64" else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, tensor.shape)
