"""What a graph or module does in one decode step: nodes, kernel launches, bytes and FLOPs, after any pass.

One row of one token at a context of `CONTEXT` positions. Before import, a launch is a node that computes a tensor;
after it, a call of a kernel or of an operator that will become one.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from v4c.custom_ops import DOMAIN, OPS, TensorSpec
from v4c.passes.onnx.hoisting import stored_in_checkpoint

from .cost import GROUPED_PRODUCT, INPUTS_ATTRIBUTE, OP_ATTRIBUTE, Cost, cost_of

CONTEXT = 4096
"""Positions in the caches when a stage is measured."""

_VIEWS = {
    "Reshape", "Squeeze", "Unsqueeze", "Shape", "Constant", "Identity", "Flatten", "relax.reshape", "relax.expand_dims",
    "relax.squeeze", "relax.flatten", "relax.vm.alloc_storage", "relax.vm.alloc_tensor", "relax.vm.kill_object",
    "relax.memory.alloc_storage", "relax.memory.alloc_tensor", "relax.memory.kill_tensor", "relax.memory.kill_storage",
    "relax.builtin.alloc_tensor", "relax.null_value", "relax.call_builtin_with_ctx", "relax.call_pure_packed",
    "relax.vm.call_tir_dyn",
}  # fmt: skip
"""Operators that run no kernel: views of memory, its management, constants."""


@dataclass
class Figures:
    """One decode step.

    Attributes:
        nodes: nodes or bindings, each function counted once.
        launches: kernel launches of the whole step.
        launches_by_function: launches in one run of each function.
        cost: bytes to and from memory and floating-point operations of the whole step.
    """

    nodes: int = 0
    launches: int = 0
    launches_by_function: dict[str, int] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "nodes": self.nodes, "launches": self.launches, "launches_by_function": self.launches_by_function,
            "bytes": round(self.cost.bytes), "flops": round(self.cost.flops),
        }  # fmt: skip


def bound(name: str) -> int:
    """The size of a symbolic dimension in the step that is measured."""
    if name.startswith("rows") and name[4:].isdigit():
        return max(1, CONTEXT // int(name[4:]))
    return 1


def measure_onnx(model: ir.Model, weights: frozenset[str], products: str) -> Figures:
    """Figures of an ONNX graph; matrices count with `products`, what they are stored as."""
    figures = Figures()
    bodies = {(f.domain, f.name): f for f in model.functions.values() if f.domain != DOMAIN}
    done: dict[tuple[str, str], tuple[int, Cost]] = {}

    def run(graph: ir.Graph | ir.Function, label: str, stored: set[ir.Value]) -> tuple[int, Cost]:
        launches, own, cost = 0, 0, Cost()
        figures.nodes += sum(1 for _ in graph)
        for node in graph:
            key = (node.domain, node.op_type)
            if key in bodies:
                if key not in done:
                    formals = zip(bodies[key].inputs, node.inputs, strict=True)
                    matrices = {f for f, v in formals if v is not None and (v in stored or _behind(v) in stored)}
                    done[key] = run(bodies[key], node.op_type, matrices)
                launches, cost = launches + done[key][0], cost + done[key][1]
            elif not _is_free(node, stored):
                own += 1
                cost += _node_cost(node, stored, products)
        figures.launches_by_function[label] = own
        return launches + own, cost

    values = [*model.graph.inputs, *model.graph.initializers.values()]
    figures.launches, figures.cost = run(model.graph, "main", {v for v in values if v.name in weights})
    return figures


def _behind(value: ir.Value) -> ir.Value:
    """The weight whose Cast or Concat a value is."""
    node = value.producer()
    if node is not None and node.op_type in ("Cast", "Concat") and node.inputs[0] is not None:
        return _behind(node.inputs[0])
    return value


def _is_free(node: ir.Node, stored: set[ir.Value]) -> bool:
    """Views, arithmetic on shapes, and what packing does to weights."""
    if node.op_type in _VIEWS:
        return True
    if node.op_type == "Split":  # outputs of a merged product are its own
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        return producer is not None and producer.op_type in ("MatMul", "RMSNormLinear")
    if node.domain == DOMAIN:
        return False
    return all(v is None or v in stored or _is_number(v) or _from_weight(v, stored) for v in node.inputs)


def _from_weight(value: ir.Value, stored: set[ir.Value]) -> bool:
    node = value.producer()
    return node is not None and node.op_type in ("Cast", "Concat", "Transpose", "Reshape") and all(
        v is None or v in stored or _is_number(v) or _from_weight(v, stored) for v in node.inputs
    )  # fmt: skip


def _is_number(value: ir.Value) -> bool:
    """Integers of rank 0 or 1 that come from shapes and constants."""
    node = value.producer()
    if node is None:
        return value.const_value is not None
    return node.op_type in ("Constant", "Shape") or (
        node.op_type in ("Concat", "Mul", "Add", "Sub", "Div", "Slice", "Gather", "Squeeze", "Unsqueeze", "Cast")
        and all(v is None or _is_number(v) for v in node.inputs)
    )


_NATIVE = {"fp8": "int8", "fp4": "int4", "float32": "float32"}
"""Types as wide as what the checkpoint stores."""


def _node_cost(node: ir.Node, stored: set[ir.Value], products: str) -> Cost:
    read = [v for v in node.inputs if v is not None and not (v.shape is None and _is_number(v))]
    inputs = [_spec(v, stored, products) for v in read]
    known = [s for s in inputs if s is not None]
    if len(known) < len(inputs):
        return Cost()
    if node.domain == DOMAIN and node.op_type in OPS:
        attributes = {n: a.value for n, a in node.attributes.items()}
        op = OPS[node.op_type]
        rule = op.shape_rule(known, attributes)
        outputs = [s for s, name in zip(rule, op.outputs, strict=True) if name not in op.writes]
        return cost_of(node.op_type, known, outputs)
    made = [_spec(v, stored, products) for v in node.outputs]
    grouped = node.op_type == "MatMul" and len(known[1].shape) > 2
    return cost_of(GROUPED_PRODUCT if grouped else node.op_type, known, [s for s in made if s is not None])


def _spec(value: ir.Value, stored: set[ir.Value], products: str) -> TensorSpec | None:
    shape = value.shape
    if shape is None and value.producer() is not None and value.producer().op_type == "Transpose":  # type: ignore[union-attr]
        return _spec(value.producer().inputs[0], stored, products)  # type: ignore[union-attr, arg-type]
    if shape is None or value.dtype is None:
        return None
    dims = tuple(d if isinstance(d, int) else bound(str(d.value)) for d in shape)
    dtype = {"FLOAT": "float32", "BFLOAT16": "bfloat16", "FLOAT16": "float16", "INT64": "int64"}.get(
        str(value.dtype), "bool"
    )
    if dtype == "float32" and len(dims) > 1 and (value in stored or _from_weight(value, stored)):
        dtype = products if products != "native" else _NATIVE.get(stored_in_checkpoint(value), "bfloat16")
    return TensorSpec(dims, dtype)


def measure_relax(module: Any) -> Figures:
    """Figures of the decode step of a Relax module, through the private functions it calls.

    Where no function is made for single tokens, it is a chunk of one.
    """
    from tvm import relax, tirx

    figures = Figures()
    done: dict[str, tuple[int, Cost]] = {}

    def run(function: Any, label: str) -> tuple[int, Cost]:
        launches, own, cost = 0, 0, Cost()
        for block in function.body.blocks:
            for binding in block.bindings:
                figures.nodes += 1
                call = binding.value
                if not isinstance(call, relax.Call) or isinstance(call.op, relax.ExternFunc):
                    continue  # a function of the runtime runs no kernel
                name = getattr(call.op, "name", "")
                target = call.args[0] if name in ("relax.call_tir", "relax.call_tir_inplace") else call.op
                if not isinstance(target, relax.GlobalVar):
                    if name not in _VIEWS:
                        own += 1
                        cost += cost_of("", _tensors(call.args), _tensors([binding.var]))
                    continue
                callee = module[target]
                if isinstance(callee, relax.Function):
                    if target.name_hint not in done:
                        done[target.name_hint] = run(callee, target.name_hint)
                    launches, cost = launches + done[target.name_hint][0], cost + done[target.name_hint][1]
                elif isinstance(callee, tirx.PrimFunc):
                    own += 1
                    cost += _call_cost(callee, call, name, binding)
        figures.launches_by_function[label] = own
        return launches + own, cost

    names = [v.name_hint for v in module.get_global_vars()]
    entry = next(n for n in ("decode_one", "prefill", "main") if n in names)
    figures.launches, figures.cost = run(module[entry], entry)
    return figures


def _call_cost(kernel: Any, call: Any, name: str, binding: Any) -> Cost:
    attributes = kernel.attrs or {}
    op = str(attributes[OP_ATTRIBUTE]) if OP_ATTRIBUTE in attributes else ""
    if name.startswith("relax.call_tir"):
        outputs = _tensors([binding.var]) if name == "relax.call_tir" else []
        return cost_of(op, _tensors(call.args[1:]), outputs)
    # Memory is explicit: the outputs stand behind the inputs.
    arguments = _tensors(call.args)
    count = int(attributes[INPUTS_ATTRIBUTE]) if INPUTS_ATTRIBUTE in attributes else len(arguments)
    return cost_of(op, arguments[:count], arguments[count:])


def _tensors(values: Any) -> list[TensorSpec]:
    """Specs of the tensors among Relax expressions, tuples opened, symbolic dimensions bound by name."""
    from tvm import relax

    found: list[TensorSpec] = []

    def visit(kind: Any) -> None:
        if isinstance(kind, relax.TupleType):
            for part in kind.fields:
                visit(part)
        elif isinstance(kind, relax.TensorType) and kind.shape is not None and kind.dtype:
            found.append(TensorSpec(tuple(_number(d) for d in kind.shape.values), str(kind.dtype)))

    for value in values:
        visit(value.ty)
    return found


def _number(dim: Any) -> int:
    """A dimension with every variable bound."""
    from tvm import tirx

    if isinstance(dim, tirx.Var):
        return bound(dim.name)
    operations: dict[Any, Any] = {
        tirx.Add: operator.add, tirx.Sub: operator.sub, tirx.Mul: operator.mul, tirx.FloorDiv: operator.floordiv,
        tirx.FloorMod: operator.mod, tirx.Max: max, tirx.Min: min,
    }  # fmt: skip
    apply = operations.get(type(dim))
    return int(dim) if apply is None else apply(_number(dim.a), _number(dim.b))
