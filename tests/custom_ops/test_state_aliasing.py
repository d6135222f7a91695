"""Past and present of a state bound to one buffer give what separate buffers give, in every ONNX Runtime mode.

A body that reads old state after writing it is silently wrong only when the two are one buffer and the nodes happen to
run in that order; so every stateful op runs here in both execution modes, optimised and not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tests.custom_ops.harness import OnnxOp, new_session, spec
from v4c.custom_ops import OPS, TensorSpec

BATCH, CAPACITY, VOCAB = 3, 20, 40
LENGTHS = np.array([[5, 0, 3], [1, 9, 2], [0, 1, 4], [7, 6, 0], [3, 8, 9], [1, 1, 1]])
"""Live tokens of each row in six successive calls; each call's chunk is as long as its longest row."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """How to run one op: specs in terms of "batch", "chunk" and "capacity", attributes, integer inputs' bounds."""

    specs: Mapping[str, TensorSpec]
    attributes: Mapping[str, int | float]
    below: Mapping[str, int]
    fixed: Mapping[str, list[int]]


SPAN = {"positions": spec("batch", dtype="int64"), "lengths": spec("batch", dtype="int64")}
ATTENTION = {
    "q": spec("batch", "chunk", 2, 6),
    "kv": spec("batch", "chunk", 6),
    "window": spec("batch", 4, 6),
    "rows": spec("batch", "capacity", 6),
    "indices": spec("batch", "chunk", 2, dtype="int64"),
    "sinks": spec(2),
    **SPAN,
}
CASES = {
    "KVCompress": Case(
        {
            "kv": spec("batch", "chunk", 12),
            "gate": spec("batch", "chunk", 12),
            "bias": spec(3, 12),
            "norm": spec(6),
            "inv_freq": spec(2),
            "state_kv": spec("batch", 6, 12),
            "state_gate": spec("batch", 6, 12),
            "rows": spec("batch", "capacity", 6),
            **SPAN,
        },
        {"ratio": 3, "eps": 1e-6},
        {},
        {},
    ),
    "CompressedSparseAttention": Case(ATTENTION, {"scale": 0.4}, {"indices": CAPACITY}, {}),
    "HeavilyCompressedAttention": Case(ATTENTION, {"ratio": 3, "scale": 0.4}, {}, {}),
    "SlidingWindowAttention": Case(ATTENTION, {"scale": 0.4}, {}, {}),
    "DerotatedCSA": Case({**ATTENTION, "inv_freq": spec(2)}, {"scale": 0.4}, {"indices": CAPACITY}, {}),
    "DerotatedHCA": Case({**ATTENTION, "inv_freq": spec(2)}, {"ratio": 3, "scale": 0.4}, {}, {}),
    "DerotatedSlidingAttention": Case({**ATTENTION, "inv_freq": spec(2)}, {"scale": 0.4}, {}, {}),
    "KVCompressPair": Case(
        {
            "kv": spec("batch", "chunk", 12),
            "gate": spec("batch", "chunk", 12),
            "bias": spec(3, 12),
            "norm": spec(6),
            "state_kv": spec("batch", 6, 12),
            "state_gate": spec("batch", 6, 12),
            "rows": spec("batch", "capacity", 6),
            "index_kv": spec("batch", "chunk", 8),
            "index_gate": spec("batch", "chunk", 8),
            "index_bias": spec(3, 8),
            "index_norm": spec(4),
            "index_state_kv": spec("batch", 6, 8),
            "index_state_gate": spec("batch", 6, 8),
            "index_rows": spec("batch", "capacity", 4),
            "inv_freq": spec(2),
            **SPAN,
        },
        {"ratio": 3, "eps": 1e-6},
        {},
        {},
    ),
    "EngramHash": Case(
        {
            "input_ids": spec("batch", "chunk", dtype="int64"),
            "lookup": spec(VOCAB, dtype="int64"),
            "multipliers": spec(3, dtype="int64"),
            "primes": spec(4, dtype="int64"),
            "offsets": spec(4, dtype="int64"),
            "history": spec("batch", 2, dtype="int64"),
            **SPAN,
        },
        {"pad_id": 0},
        {"input_ids": VOCAB, "lookup": VOCAB, "multipliers": 1 << 40, "history": VOCAB},
        {"primes": [101, 103, 107, 109], "offsets": [0, 101, 204, 311]},
    ),
    "EngramGateConv": Case(
        {
            "keys": spec("batch", "chunk", 2, 4),
            "value": spec("batch", "chunk", 4),
            "streams": spec("batch", "chunk", 2, 4),
            "key_norm": spec(2, 4),
            "stream_norm": spec(2, 4),
            "conv_norm": spec(2, 4),
            "conv_weight": spec(8, 3),
            "conv_state": spec("batch", 4, 8),
            **SPAN,
        },
        {"dilation": 2, "eps": 1e-6},
        {},
        {},
    ),
}
STATEFUL = sorted(name for name, op in OPS.items() if op.writes)


def random_inputs(case: Case, rng: np.random.Generator, chunk: int) -> Arrays:
    """Every input but positions and lengths."""
    sizes = {"batch": BATCH, "chunk": chunk, "capacity": CAPACITY}
    arrays = {}
    for name, tensor in case.specs.items():
        shape = [sizes.get(d, d) for d in tensor.shape]
        if name in case.fixed:
            arrays[name] = np.array(case.fixed[name])
        elif tensor.dtype == "int64":
            arrays[name] = rng.integers(0, case.below.get(name, 1), shape)
        else:
            arrays[name] = rng.standard_normal(shape, dtype=np.float32)
    return arrays


@cache
def onnx_op(name: str) -> OnnxOp:
    case = CASES[name]
    return OnnxOp(OPS[name], case.specs, **case.attributes)


def run_bound(session: ort.InferenceSession, feeds: Arrays, states: Mapping[str, str], one_buffer: bool) -> Arrays:
    """Run with I/O binding; `states` maps an output to the input whose buffer it gets, or a buffer of its own."""
    binding = session.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array.copy()) for name, array in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    bound = {}
    for output in (o.name for o in session.get_outputs()):
        if output in states:
            past = feeds[states[output]]
            own = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(past))
            bound[output] = values[states[output]] if one_buffer else own
            binding.bind_ortvalue_output(output, bound[output])
        else:
            binding.bind_output(output)
    session.run_with_iobinding(binding)
    results = zip((o.name for o in session.get_outputs()), binding.get_outputs(), strict=True)
    return {name: (bound.get(name) or value).numpy().copy() for name, value in results}


def run_stream(session: ort.InferenceSession, name: str, one_buffer: bool) -> list[Arrays]:
    """Outputs of successive calls, each with the state the last one left."""
    op, case = OPS[name], CASES[name]
    states = {f"{output}_out": past for output, past in op.writes.items()}
    rng = np.random.default_rng(11)
    positions = np.zeros(BATCH, np.int64)
    state: Arrays = {}
    results = []
    for lengths in LENGTHS:
        inputs = random_inputs(case, rng, int(lengths.max())) | {"positions": positions, "lengths": lengths} | state
        outputs = run_bound(session, {n: inputs[n] for n in op.inputs}, states, one_buffer)
        state = {past: outputs[output] for output, past in states.items()}
        positions = positions + lengths
        results.append(outputs)
    return results


def test_every_stateful_op_has_a_case() -> None:
    assert set(STATEFUL) == set(CASES)


@pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
@pytest.mark.parametrize("name", STATEFUL)
def test_one_buffer_equals_two(name: str, parallel: bool, optimize: bool) -> None:
    session = new_session(onnx_op(name).model, optimize, parallel)
    separate, aliased = (run_stream(session, name, one_buffer) for one_buffer in (False, True))
    for call, (expected, found) in enumerate(zip(separate, aliased, strict=True)):
        for output in expected:
            np.testing.assert_array_equal(found[output], expected[output], err_msg=f"{output} of call {call}")


SHAPE_ONLY = {"Shape", "Size"}
VIEWS = {"Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""Ops whose output may be the input's own memory."""


@pytest.mark.parametrize("name", STATEFUL)
def test_every_read_of_old_state_comes_before_the_write_in_any_order(name: str) -> None:
    """Each node that reads a past state is an ancestor of the node that writes the present one."""
    graph = onnx.inliner.inline_local_functions(onnx_op(name).model).graph
    producer = {output: node for node in graph.node for output in node.output}
    for output, past in OPS[name].writes.items():
        writer = producer[f"{output}_out"]
        assert writer.op_type == "ScatterND"
        aliases = {past}
        for node in graph.node:  # in topological order
            if node.op_type in VIEWS and node.input[0] in aliases:
                aliases.update(node.output)
        ancestors, pending = set(), list(writer.input)
        while pending:
            tensor = pending.pop()
            if tensor in producer and tensor not in ancestors:
                pending += producer[tensor].input
            ancestors.add(tensor)
        for node in graph.node:
            if node is not writer and node.op_type not in SHAPE_ONLY and aliases & set(node.input):
                assert node.output[0] in ancestors, f"{node.op_type} may read {past} after the write"


def test_the_comparison_sees_a_read_after_the_write() -> None:
    """A graph that writes its state first and reads the old one later: right with two buffers, wrong with one."""
    nodes = [
        helper.make_node("Add", ["past", "x"], ["present"]),
        helper.make_node("ReduceSum", ["present"], ["written"]),
        helper.make_node("Mul", ["written", "zero"], ["late"]),
        helper.make_node("Add", ["past", "late"], ["y"]),
    ]

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [4])

    zero = helper.make_tensor_value_info("zero", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "hazard", [value("past"), value("x"), zero], [value("present"), value("y")])
    session = new_session(helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 23)]))
    feeds = {"past": np.ones(4, np.float32), "x": np.ones(4, np.float32), "zero": np.zeros((), np.float32)}
    read = [run_bound(session, feeds, {"present": "past"}, one_buffer)["y"].tolist() for one_buffer in (False, True)]
    assert read == [[1.0] * 4, [2.0] * 4]
