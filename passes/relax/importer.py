"""Imports an ONNX graph with v4c's ops into a Relax module, each op converted as one call of a target's kernel.

Model-local functions (the layers) become private Relax functions, imported once per set of argument types, so code
size does not grow with depth. Shape arithmetic is evaluated here, on symbolic integers: none is left in the module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from v4c.custom_ops import DOMAIN, OPS, CustomOp, TensorSpec
from v4c.errors import UnsupportedError

from .layouts import MATRIX_LAYOUTS, Callee, WeightSpec, layout_of, uses
from .operators import CONVERTERS, Shape


class Kernels(Protocol):
    """What a target gives the importer: a PrimFunc per op and the packed form of weights."""

    def custom(self, op: CustomOp, inputs: Sequence[TensorSpec], attributes: Mapping[str, int | float]) -> Any:
        """Kernel of a custom op: inputs, then the outputs that are not written in place."""

    def linear(self, n: int, k: int, dtype: str) -> Any:
        """``x [rows, K]`` and a packed ``[N, K]`` weight to ``[rows, N]``."""

    def grouped_linear(self, groups: int, n: int, k: int, dtype: str) -> Any:
        """``x [rows, G, K]`` and a packed ``[G, N, K]`` weight to ``[rows, G, N]``."""

    def rms_norm(self, width: int, eps: float, weighted: bool) -> Any:
        """``x [rows, D]`` (and ``weight [D]``) to ``[rows, D]``."""

    def packed(self, weight: WeightSpec) -> TensorSpec:
        """Shape and dtype a weight has in memory."""


_OPAQUE = 8
"""TVM's pattern kind of a kernel that nothing may be fused into: ours are scheduled already."""


@dataclass(frozen=True)
class WeightUse:
    """A weight inside the graph being imported: its Relax parameter, and how it is packed."""

    var: Any
    spec: WeightSpec


@dataclass
class ImportedFunction:
    """A Relax function of the module: names of its inputs, and the weights it takes after them, in order."""

    inputs: list[str]
    weights: list[WeightSpec]
    global_var: Any


@dataclass
class Importer:
    """Imports graphs of one ONNX model into `builder`; kernels are shared between everything imported.

    Attributes:
        model: the ONNX model, weights as initializers or as inputs named in `weight_names`.
        kernels: the target.
        weight_names: names of the values that are weights.
        matrix_dtype: storage dtype of matrices and tables: ``float32`` or ``bfloat16``.
    """

    model: ir.Model
    kernels: Kernels
    weight_names: frozenset[str]
    matrix_dtype: str = "float32"
    builder: Any = field(default_factory=relax.BlockBuilder)
    _kernel_vars: dict[Any, Any] = field(default_factory=dict)
    _privates: dict[Any, ImportedFunction] = field(default_factory=dict)
    _callees: dict[tuple[str, str], Callee] = field(default_factory=dict)

    def kernel(self, key: Any, make: Any) -> Any:
        """GlobalVar of a kernel, built by `make()` the first time `key` is asked for."""
        if key not in self._kernel_vars:
            function = make()
            function = function.without_attr("global_symbol").with_attr("op_pattern", _OPAQUE)
            self._kernel_vars[key] = self.builder.add_func(function, str(key[0]))
        return self._kernel_vars[key]

    def import_main(self, name: str, bindings: Mapping[str, int] | None = None) -> ImportedFunction:
        """Import the main graph as public function `name`; `bindings` fixes symbolic dims, e.g. ``chunk`` to 1."""
        # Model-local functions that are not bodies of custom ops; anew each time, for the head may have been changed.
        bodies = [f for f in self.model.functions.values() if f.domain != DOMAIN]
        self._callees = {(f.domain, f.name): Callee(f, uses(f)) for f in bodies}
        graph, dims = self.model.graph, _Dims(bindings or {})
        consumers = uses(graph)
        inputs = [v for v in graph.inputs if v.name not in self.weight_names]
        weights = [v for v in (*graph.inputs, *graph.initializers.values()) if v.name in self.weight_names]
        specs = [self._weight_spec(v, consumers) for v in weights]
        for node in graph:
            if (node.domain, node.op_type) in self._callees:
                self._private(node, dims, f"{name}_{node.op_type}")
        types = [dims.spec(v) for v in inputs]
        constants = {str(v.name): v for v in graph.initializers.values() if v.name not in self.weight_names}
        return self._function(name, list(graph), inputs, types, list(zip(weights, specs, strict=True)),
                              list(graph.outputs), constants, dims, private=False)  # fmt: skip

    def _weight_spec(self, value: ir.Value, consumers: Any) -> WeightSpec:
        assert value.name is not None
        shape, dtype = tuple(int(d) for d in value.shape), str(value.dtype)  # type: ignore[union-attr, arg-type]
        layout, groups = layout_of(value.name, consumers, self._callees)
        storage = "int64" if dtype == "INT64" else self.matrix_dtype if layout in MATRIX_LAYOUTS else "float32"
        return WeightSpec(value.name, layout, shape, groups, storage)

    def _private(self, call: ir.Node, dims: _Dims, name: str) -> ImportedFunction:
        """The private Relax function of a model-local function for the argument types of `call`."""
        callee = self._callees[(call.domain, call.op_type)]
        function, consumers = callee.function, callee.consumers
        types, weights, inputs = [], [], []
        for formal, actual in zip(function.inputs, call.inputs, strict=True):
            assert actual is not None
            origin = _origin(actual)
            if origin.name in self.weight_names:
                spec = self._weight_spec(_retyped(formal, origin), consumers)
                weights.append((formal, spec))
            else:
                inputs.append(formal)
                types.append(dims.spec(actual))
        key = (call.domain, call.op_type, tuple((s.shape, s.dtype) for s in types), tuple(s for _, s in weights))
        if key not in self._privates:
            own = _Dims(dims.bindings)
            fresh = [own.renamed(t) for t in types]
            self._privates[key] = self._function(
                name, list(function), inputs, fresh, weights, list(function.outputs), {}, own, private=True
            )
        return self._privates[key]

    def _function(
        self, name: str, nodes: list[ir.Node], inputs: list[ir.Value], types: list[TensorSpec],
        weights: list[tuple[ir.Value, WeightSpec]], outputs: list[ir.Value], constants: Mapping[str, ir.Value],
        dims: _Dims, private: bool,
    ) -> ImportedFunction:  # fmt: skip
        env: dict[str, Any] = {}
        for value, spec in zip(inputs, types, strict=True):
            env[str(value.name)] = relax.Var(_identifier(value), relax.TensorType(spec.shape, spec.dtype))
        parameters = list(env.values())
        for value, weight in weights:
            packed = self.kernels.packed(weight)
            var = relax.Var("w_" + _identifier(value), relax.TensorType(packed.shape, packed.dtype))
            env[str(value.name)] = WeightUse(var, weight)
            parameters.append(var)
        for constant, value in constants.items():
            assert value.const_value is not None
            env[constant] = value.const_value.numpy()
        with self._scope(name, parameters, private):
            with self.builder.dataflow():
                for node in nodes:
                    self._node(node, env, dims)
                results = [self.tensor(env[str(v.name)]) for v in outputs]
                out = self.builder.emit_output(relax.Tuple(results))
            var = self.builder.emit_func_output(out)
        return ImportedFunction([str(v.name) for v in inputs], [w for _, w in weights], var)

    @contextlib.contextmanager
    def _scope(self, name: str, parameters: list[Any], private: bool) -> Iterator[None]:
        """The builder's function scope; an error closes its last block, which TVM's own scope leaves open."""
        try:
            with self.builder.function(name, parameters, private=private):
                yield
        except BaseException:
            self.builder._end_block()
            raise

    def _node(self, node: ir.Node, env: dict[str, Any], dims: _Dims) -> None:
        args = [env[str(v.name)] if v is not None else None for v in node.inputs]
        attributes = {name: _attribute(a) for name, a in node.attributes.items()}
        if (node.domain, node.op_type) in self._callees:
            results = self._call(node, args, dims)
        elif node.domain == DOMAIN and node.op_type in OPS:
            results = self._custom(OPS[node.op_type], args, attributes)
        elif node.domain == "" and node.op_type in CONVERTERS:
            results = CONVERTERS[node.op_type](self, args, attributes, len(node.outputs))
        else:
            where = f"{node.domain or 'ai.onnx'}::{node.op_type}"
            raise UnsupportedError(f"node {node.name!r}: no conversion for operator {where}")
        for value, result in zip(node.outputs, results, strict=True):
            env[str(value.name)] = result

    def _call(self, node: ir.Node, args: list[Any], dims: _Dims) -> list[Any]:
        function = self._private(node, dims, node.op_type)
        tensors = [self.tensor(a) for a in args if not isinstance(a, WeightUse)]
        weights = [a.var for a in args if isinstance(a, WeightUse)]
        out = self.builder.emit(relax.Call(function.global_var, [*tensors, *weights]))
        return [self.builder.emit(relax.TupleGetItem(out, i)) for i in range(len(node.outputs))]

    def _custom(self, op: CustomOp, args: list[Any], attributes: dict[str, Any]) -> list[Any]:
        # Kernels see a packed weight; the op's shape rule sees what the graph sees.
        logical = [TensorSpec(a.spec.shape, a.spec.dtype) if isinstance(a, WeightUse) else None for a in args]
        variables = [self.tensor(a) for a in args]
        specs = [spec or spec_of(v) for spec, v in zip(logical, variables, strict=True)]
        static = tuple(tuple(int(d) if isinstance(d, int | tirx.IntImm) else None for d in s.shape) for s in specs)
        key = (op.torch_name, static, tuple(s.dtype for s in specs), tuple(sorted(attributes.items())))
        kernel = self.kernel(key, lambda: self.kernels.custom(op, specs, attributes))
        return op.to_relax(self.builder, kernel, variables, specs, attributes)

    def tensor(self, value: Any) -> Any:
        """A Relax variable for any value of the environment: constants are embedded, plain weights are parameters."""
        if isinstance(value, WeightUse):
            return value.var
        if isinstance(value, Shape):
            raise UnsupportedError("a computed shape is used as a tensor: expected only in shape arguments")
        return relax.const(value, str(value.dtype)) if isinstance(value, np.ndarray) else value

    def rows(self, x: Any, width: int) -> tuple[Any, list[Any]]:
        """``x [..., width]`` as ``[rows, width]`` and the leading dimensions it had."""
        lead = list(x.ty.shape.values)[:-1]
        rows: Any = tirx.IntImm("int64", 1)
        for dim in lead:
            rows = rows * dim
        return self.builder.emit(relax.op.reshape(x, [rows, width])), lead


class _Dims:
    """Symbolic dimensions of one Relax function, by name; bound ones are constants."""

    def __init__(self, bindings: Mapping[str, int]) -> None:
        self.bindings = bindings
        self._vars: dict[str, Any] = {}

    def dim(self, dim: Any) -> Any:
        if isinstance(dim, int):
            return tirx.IntImm("int64", dim)
        name = str(dim.value if isinstance(dim, ir.SymbolicDim) else dim)
        if name in self.bindings:
            return tirx.IntImm("int64", self.bindings[name])
        return self._vars.setdefault(name, tirx.Var(name, "int64"))

    def spec(self, value: ir.Value) -> TensorSpec:
        if value.shape is None or value.dtype is None:
            raise UnsupportedError(f"value {value.name!r}: expected a known shape and dtype; run shape inference first")
        return TensorSpec(tuple(self.dim(d) for d in value.shape), _DTYPES[str(value.dtype)])

    def renamed(self, spec: TensorSpec) -> TensorSpec:
        """The same spec on this function's own variables."""
        shape = tuple(d if isinstance(d, tirx.IntImm) else self.dim(d.name) for d in spec.shape)
        return TensorSpec(shape, spec.dtype)


_DTYPES = {"FLOAT": "float32", "INT64": "int64", "BFLOAT16": "bfloat16", "FLOAT16": "float16", "BOOL": "bool"}


def spec_of(var: Any) -> TensorSpec:
    """Shape and dtype of a Relax variable."""
    return TensorSpec(tuple(var.ty.shape.values), str(var.ty.dtype))


def _origin(value: ir.Value) -> ir.Value:
    """The weight behind a Cast, or the value itself."""
    node = value.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        return node.inputs[0]
    return value


def _retyped(formal: ir.Value, actual: ir.Value) -> ir.Value:
    return ir.Value(name=formal.name, shape=actual.shape, type=actual.type)


def _identifier(value: ir.Value) -> str:
    return "".join(c if c.isalnum() else "_" for c in str(value.name))


def _attribute(attribute: Any) -> Any:
    value = attribute.value
    return value.numpy() if attribute.type == ir.AttributeType.TENSOR else value
