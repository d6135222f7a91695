"""The importer on graphs of a few nodes: standard operators against ONNX Runtime, layouts, sharing, refusals."""

from __future__ import annotations

import os
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

os.environ.setdefault("TVM_NUM_THREADS", "2")

import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from v4c.errors import UnsupportedError
from v4c.passes.pipeline import PassOptions, relax_pipeline
from v4c.passes.relax.importer import Importer
from v4c.passes.relax.layouts import Layout, WeightSpec, merged_name, part_names
from v4c.targets.cpu.lowering import CPUKernels
from v4c.targets.cpu.packing import pack, packed

RNG = np.random.default_rng()


def graph(
    nodes: list[Any], inputs: dict[str, list[Any]], outputs: list[str], weights: dict[str, np.ndarray],
    constants: dict[str, np.ndarray] | None = None, functions: list[Any] | None = None,
) -> Any:  # fmt: skip
    """An ONNX model; weights and constants are initializers."""
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    out = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    initializers = [numpy_helper.from_array(a, n) for n, a in {**weights, **(constants or {})}.items()]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("local", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "g", made, out, initializers),
        opset_imports=opsets,
        functions=functions or [],
        ir_version=11,
    )


def import_model(model: Any, weights: dict[str, np.ndarray], bindings: dict[str, int] | None = None) -> Any:
    importer = Importer(ir.from_proto(model), CPUKernels(), frozenset(weights))
    function = importer.import_main("main", bindings)
    return importer.builder.finalize(), function


def run(model: Any, weights: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The model through the importer and the whole pipeline."""
    module, function = import_model(model, weights)
    return execute(module, [feeds[n] for n in function.inputs] + [pack(w, weights[w.name]) for w in function.weights])


def execute(module: Any, arguments: list[np.ndarray]) -> list[np.ndarray]:
    """Function ``main`` of a module, built by the whole pipeline."""
    target = tvm.target.Target("llvm")
    built = relax.build(module, target=target, relax_pipeline=relax_pipeline(target, PassOptions()))
    machine = relax.VirtualMachine(built, tvm.cpu())
    return [t.numpy() for t in machine["main"](*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arguments))]


def reference(model: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(model.SerializeToString()).run(None, feeds)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs, [output], **attributes)


CASES = {
    "linear": (
        [node("Transpose", ["w"], "t", perm=[1, 0]), node("MatMul", ["x", "t"], "y")], {"w": normal(37, 12)}, {}
    ),
    "linear_kn": ([node("MatMul", ["x", "w"], "y")], {"w": normal(12, 37)}, {}),
    "norm": ([node("RMSNormalization", ["x", "w"], "y", axis=-1, epsilon=1e-5)], {"w": normal(12)}, {}),
    "elementwise": (
        [
            node("Clip", ["x", "", "high"], "c"),
            node("Sigmoid", ["c"], "s"),
            node("Mul", ["c", "s"], "m"),
            node("Sub", ["m", "high"], "d"),
            node("Div", ["d", "two"], "y"),
        ],
        {},
        {"high": np.float32(0.4), "two": np.array([2.0], np.float32)},
    ),
    "shapes": (
        [
            node("Shape", ["x"], "s", start=0, end=2),
            node("Concat", ["s", "tail"], "target", axis=0),
            node("Reshape", ["x", "target"], "r"),
            node("Transpose", ["r"], "t", perm=[0, 1, 3, 2]),
            node("Unsqueeze", ["t", "axis"], "u"),
            node("Squeeze", ["u", "axis"], "q"),
            node("Slice", ["q", "zero", "one", "last"], "y"),
        ],
        {},
        {
            "tail": np.array([3, 4]), "axis": np.array([2]), "zero": np.array([0]), "one": np.array([1]),
            "last": np.array([-1]),
        },
    ),
    "arithmetic_on_shapes": (
        [
            node("Shape", ["x"], "s", start=1, end=2),
            node("Mul", ["s", "six"], "rows"),
            node("Concat", ["minus", "rows", "two"], "target", axis=0),
            node("Reshape", ["x", "target"], "y"),
        ],
        {},
        {"six": np.array([6]), "minus": np.array([-1]), "two": np.array([2])},
    ),
    "grouped_linear": (
        [
            node("Reshape", ["w", "blocks"], "b"),
            node("Transpose", ["b"], "t", perm=[0, 2, 1]),
            node("Reshape", ["x", "grouped"], "g"),
            node("MatMul", ["g", "t"], "y"),
        ],
        {"w": normal(3 * 5, 4)},
        {"blocks": np.array([3, 5, 4]), "grouped": np.array([0, 0, 3, 1, 4])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_matches_onnxruntime(name: str) -> None:
    nodes, weights, constants = CASES[name]
    model = graph(nodes, {"x": ["batch", "chunk", 12]}, ["y"], weights, constants)
    for batch, chunk in ((1, 1), (2, 5), (3, 17)):
        feeds = {"x": normal(batch, chunk, 12)}
        (found,), (expected,) = run(model, weights, feeds), reference(model, feeds)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "linear_kn", "grouped_linear"])
def test_layout_follows_use(name: str) -> None:
    nodes, weights, constants = CASES[name]
    _, function = import_model(graph(nodes, {"x": ["batch", "chunk", 12]}, ["y"], weights, constants), weights)
    assert [w.layout.value for w in function.weights] == [name]


def test_a_weight_used_in_two_ways_stays_plain() -> None:
    weights = {"w": normal(12, 12)}
    nodes = [node("MatMul", ["x", "w"], "m"), node("Add", ["m", "w"], "y")]
    model = graph(nodes, {"x": [1, 12, 12]}, ["y"], weights)
    _, function = import_model(model, weights)
    assert [w.layout for w in function.weights] == [Layout.PLAIN]
    feeds = {"x": normal(1, 12, 12)}
    np.testing.assert_allclose(run(model, weights, feeds)[0], reference(model, feeds)[0], rtol=1e-4, atol=1e-4)


def test_a_table_that_is_also_a_projection_is_stored_once_as_it_is() -> None:
    """Tied embeddings: rows are gathered from what the last product multiplies with."""
    weights = {"w": normal(12, 12)}
    nodes = [
        node("Transpose", ["w"], "t", perm=[1, 0]),
        node("MatMul", ["x", "t"], "m"),
        node("Gather", ["w", "ids"], "rows", axis=0),
        node("Add", ["m", "rows"], "y"),
    ]
    model = graph(nodes, {"x": ["batch", 2, 12]}, ["y"], weights, {"ids": np.array([3, 7])})
    _, function = import_model(model, weights)
    assert [(w.layout, w.shape) for w in function.weights] == [(Layout.ROWS, (12, 12))]
    feeds = {"x": normal(3, 2, 12)}
    np.testing.assert_allclose(run(model, weights, feeds)[0], reference(model, feeds)[0], rtol=1e-5, atol=1e-5)


MERGED = [
    node("Concat", ["a", "b", "c"], "w", axis=0),
    node("Transpose", ["w"], "t", perm=[1, 0]),
    node("MatMul", ["x", "t"], "y"),
]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("pack_weights", [True, False])
def test_joined_weights_are_one_product(split: bool, pack_weights: bool) -> None:
    """With a Split of the same sizes the parts are the kernel's outputs; otherwise they are joined again."""
    weights = {"a": normal(5, 12), "b": normal(40, 12), "c": normal(1, 12)}
    tail = [helper.make_node("Split", ["y", "sizes"], ["ya", "yb", "yc"], axis=-1)] if split else []
    outputs = ["ya", "yb", "yc"] if split else ["y"]
    model = graph([*MERGED, *tail], {"x": ["batch", 3, 12]}, outputs, weights, {"sizes": np.array([5, 40, 1])})
    importer = Importer(ir.from_proto(model), CPUKernels(), frozenset(weights), pack_weights=pack_weights)
    function = importer.import_main("main")
    (spec,) = function.weights
    assert spec.name == "{a,b,c}"
    assert spec.layout == (Layout.LINEAR if pack_weights else Layout.ROWS)
    assert spec.tensors == (("a", (5, 12)), ("b", (40, 12)), ("c", (1, 12)))
    feeds = {"x": normal(2, 3, 12)}
    joined = np.concatenate([weights[n] for n, _ in spec.tensors])
    found = execute(importer.builder.finalize(), [feeds["x"], pack(spec, joined)])
    for a, b in zip(found, reference(model, feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_part_that_is_also_read_alone_is_stored_for_both() -> None:
    weights = {"a": normal(5, 12), "b": normal(3, 12), "c": normal(4, 12)}
    nodes = [*MERGED, node("Transpose", ["a"], "ta", perm=[1, 0]), node("MatMul", ["x", "ta"], "alone")]
    _, function = import_model(graph(nodes, {"x": [1, 3, 12]}, ["y", "alone"], weights), weights)
    assert [w.name for w in function.weights] == ["a", "{a,b,c}"]


@pytest.mark.parametrize("names", [
    ("model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.self_attn.kv_proj.weight"), ("a", "b"),
    ("x.a.w", "x.a.b.w"), ("same.w", "same.w"),
])  # fmt: skip
def test_a_merged_name_says_its_parts(names: tuple[str, ...]) -> None:
    expected = {
        "model.layers.0.self_attn.q_a_proj.weight": "model.layers.0.self_attn.{q_a_proj,kv_proj}.weight",
        "a": "{a,b}", "x.a.w": "x.a.{w,b.w}", "same.w": "same.{w,w}",
    }  # fmt: skip
    assert merged_name(names) == expected[names[0]]
    assert part_names(merged_name(names)) == list(names)
    assert part_names(names[0]) == [names[0]]


def test_functions_are_imported_once_and_weights_stay_apart() -> None:
    body = [node("Transpose", ["w"], "t", perm=[1, 0]), node("MatMul", ["x", "t"], "y")]
    local = helper.make_function("local", "Block", ["x", "w"], ["y"], body, [helper.make_opsetid("", 23)])
    weights = {f"w{i}": normal(12, 12) for i in range(5)}
    nodes, value = [], "x"
    for name in weights:
        nodes.append(helper.make_node("Block", [value, name], [f"h{name}"], domain="local"))
        value = f"h{name}"
    model = graph(nodes, {"x": ["batch", 3, 12]}, [value], weights, functions=[local])
    for made in model.graph.node:  # the importer needs the types of what it hands to a function
        model.graph.value_info.append(
            helper.make_tensor_value_info(made.output[0], TensorProto.FLOAT, ["batch", 3, 12])
        )
    module, function = import_model(model, weights)
    assert [w.name for w in function.weights] == list(weights)
    assert all(w.layout == Layout.LINEAR for w in function.weights)
    functions = [f for f in module.functions.values() if isinstance(f, relax.Function)]
    kernels = [f for f in module.functions.values() if not isinstance(f, relax.Function)]
    # The block, what stands before the last call, and the main function.
    assert (len(functions), len(kernels)) == (3, 1)
    feeds = {"x": normal(2, 3, 12)}
    np.testing.assert_allclose(run(model, weights, feeds)[0], reference(model, feeds)[0], rtol=1e-4, atol=1e-3)


def test_binding_a_dimension_specialises_the_function() -> None:
    nodes, weights, constants = CASES["shapes"]
    model = graph(nodes, {"x": ["batch", "chunk", 12]}, ["y"], weights, constants)
    module, _ = import_model(model, weights, {"chunk": 1})
    shape = module["main"].params[0].ty.shape.values
    assert shape[0].name == "batch"
    assert [int(d) for d in shape[1:]] == [1, 12]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("Hardmax", ["x"], "y")], "no conversion for operator ai.onnx::Hardmax"),
        ([node("RMSNormalization", ["x", "x"], "y", axis=1)], "expected axis -1, found 1"),
    ],
)
def test_refusals_name_the_operator(nodes: list[Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        import_model(graph(nodes, {"x": ["batch", 4, 12]}, ["y"], {}), {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", list(Layout))
def test_packed_shape_and_dtype_are_what_packing_gives(layout: Layout, dtype: str) -> None:
    shape = (3, 10, 6) if layout in (Layout.GATE_UP, Layout.EXPERTS_DOWN) else (12, 7)
    spec = WeightSpec("w", layout, shape, 3 if layout == Layout.GROUPED_LINEAR else 1, dtype)
    array = pack(spec, normal(*shape))
    assert array.shape == tuple(packed(spec).shape)
    assert array.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    assert packed(spec).dtype == dtype


COMPRESS = {
    "kv": ["batch", "chunk", 8], "gate": ["batch", "chunk", 8], "bias": [4, 8], "norm": [8], "inv_freq": [2],
    "state_kv": ["batch", 4, 8], "state_gate": ["batch", 4, 8], "rows": ["batch", "rows4", 8], "positions": ["batch"],
    "lengths": ["batch"],
}  # fmt: skip


@pytest.mark.parametrize("read", [True, False])
def test_a_function_returns_state_only_where_its_update_would_be_dead_code(read: bool) -> None:
    """State is updated in the caller's memory; what only updates state must stay alive through what it returns."""
    state = ["new_kv", "new_gate", "new_rows"]
    body = [
        helper.make_node("KVCompress", list(COMPRESS), state, domain="v4c", ratio=4, eps=1e-6),
        helper.make_node("Neg" if read else "Identity", ["new_rows" if read else "kv"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("v4c", 1)]
    local = helper.make_function("local", "Layer", list(COMPRESS), ["y", *state], body, opsets)
    call = helper.make_node("Layer", list(COMPRESS), ["out", *(f"present_{s}" for s in state)], domain="local")
    tail = node("Neg", ["out"], "logits")
    integers = {"positions", "lengths"}
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64 if n in integers else TensorProto.FLOAT, s)
        for n, s in COMPRESS.items()
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("logits", *call.output[1:])]
    model = helper.make_model(
        helper.make_graph([call, tail], "g", inputs, outputs), opset_imports=[*opsets, helper.make_opsetid("local", 1)],
        functions=[local], ir_version=11,
    )  # fmt: skip
    module, _ = import_model(model, {})
    (layer,) = (f for v, f in module.functions.items() if v.name_hint == "main_Layer")
    returned = layer.ret_ty.fields
    assert len(returned) == (1 if read else 3)  # y is what was handed in, too, where it is kv itself
    assert len(module["main"].ret_ty.fields) == 4
    if read:
        rng = np.random.default_rng()
        arrays = {
            n: rng.standard_normal([{"batch": 2, "chunk": 3, "rows4": 5}.get(str(d), d) for d in s]).astype(np.float32)
            for n, s in COMPRESS.items() if n not in integers
        }  # fmt: skip
        arrays |= {"positions": np.array([0, 2]), "lengths": np.array([3, 3])}
        held = {n: tvm.runtime.tensor(a) for n, a in arrays.items()}
        target = tvm.target.Target("llvm")
        built = relax.build(module, target=target, relax_pipeline=relax_pipeline(target, PassOptions()))
        results = relax.VirtualMachine(built, tvm.cpu())["main"](*held.values())
        np.testing.assert_array_equal(results[1].numpy(), held["state_kv"].numpy())
        assert not np.array_equal(held["state_kv"].numpy(), arrays["state_kv"]), "updated in the caller's memory"
        np.testing.assert_array_equal(held["state_kv"].numpy()[0, :3], arrays["kv"][0, :3])
