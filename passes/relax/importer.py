"""Imports an ONNX graph with v4c's ops into a Relax module, each op converted as one call of a target's kernel.

Model-local functions (the layers) become private Relax functions, imported once per set of argument types, so code
size does not grow with depth. Shape arithmetic is evaluated here, on symbolic integers: none is left in the module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from v4c.custom_ops import DOMAIN, OPS, CustomOp, TensorSpec
from v4c.errors import UnsupportedError
from v4c.passes.cost import INPUTS_ATTRIBUTE, OP_ATTRIBUTE
from v4c.passes.onnx.hoisting import stored_in_checkpoint

from .kernels import FollowsStorage, Kernel, Kernels
from .layouts import Callee, Layout, Storage, WeightSpec, layout_of, merged_name, native_storage, uses
from .merges import Merges, find_merges, origin
from .operators import CONVERTERS
from .products import rms_norm_linear
from .values import Parts, Shape, WeightUse

_OPAQUE = 8
"""TVM's pattern kind of a kernel that nothing may be fused into: ours are scheduled already."""


@dataclass
class ImportedFunction:
    """A Relax function of the module.

    Attributes:
        inputs: names of its inputs.
        weights: the weights it takes after them.
        global_var: its variable.
        passed: of a private function, outputs that are inputs updated in place, by index: it does not return them.
    """

    inputs: list[str]
    weights: list[WeightSpec]
    global_var: Any
    passed: dict[int, int]

    def call(self, builder: Any, inputs: list[Any], weights: list[Any], outputs: int) -> list[Any]:
        """Emit a call; one variable per output, those that are updated in place as they were handed in."""
        out = builder.emit(relax.Call(self.global_var, [*inputs, *weights]))
        returned = iter(range(outputs - len(self.passed)))
        return [
            inputs[self.passed[i]] if i in self.passed else builder.emit(relax.TupleGetItem(out, next(returned)))
            for i in range(outputs)
        ]


@dataclass
class Importer:
    """Imports graphs of one ONNX model into `builder`; kernels are shared between everything imported.

    Attributes:
        model: the ONNX model, weights as initializers or as inputs named in `weight_names`.
        kernels: the target.
        weight_names: names of the values that are weights.
        storage: what weights are stored as.
        share_layers: one Relax function for all calls of a model-local function with the same argument types, rather
            than one for each.
        pack_weights: whether projections are packed for their kernel; what only one kernel can read always is.
    """

    model: ir.Model
    kernels: Kernels
    weight_names: frozenset[str]
    storage: Storage = field(default_factory=Storage)
    share_layers: bool = True
    pack_weights: bool = True
    builder: Any = field(default_factory=relax.BlockBuilder)
    _kernel_vars: dict[Any, Any] = field(default_factory=dict)
    _privates: dict[Any, ImportedFunction] = field(default_factory=dict)
    _callees: dict[tuple[str, str], Callee] = field(default_factory=dict)
    _merges: Merges = field(default_factory=Merges)
    _updated: dict[Any, Any] = field(default_factory=dict)  # state after an op to the variable whose memory it is

    def __post_init__(self) -> None:
        if isinstance(self.kernels, FollowsStorage):
            self.kernels = self.kernels.storing(self.storage)

    def beside(self, model: ir.Model, weight_names: frozenset[str]) -> Importer:
        """An importer of another model into the same module, with the same settings; it shares the kernels."""
        return replace(
            self, model=model, weight_names=weight_names, _privates={}, _callees={}, _merges=Merges(), _updated={}
        )

    def kernel(self, kernel: Kernel, op: str, inputs: int) -> Any:
        """GlobalVar of a kernel with that many inputs, built when first asked for; `op` is what it computes."""
        if kernel not in self._kernel_vars:
            notes = {"op_pattern": _OPAQUE, OP_ATTRIBUTE: op, INPUTS_ATTRIBUTE: inputs}
            function = kernel.build().without_attr("global_symbol").with_attrs(notes)
            self._kernel_vars[kernel] = self.builder.add_func(function, kernel.factory.__name__)
        return self._kernel_vars[kernel]

    def import_main(self, name: str, bindings: Mapping[str, int] | None = None) -> ImportedFunction:
        """Import the main graph as public function `name`; `bindings` fixes symbolic dims, e.g. ``chunk`` to 1.

        What stands before the last call (the head) becomes a private function, which main functions that differ only in
        their head share.
        """
        # Model-local functions that are not bodies of custom ops; anew each time, for the head may have been changed.
        bodies = [f for f in self.model.functions.values() if f.domain != DOMAIN]
        self._callees = {(f.domain, f.name): Callee(f, uses(f)) for f in bodies}
        graph, dims, own = self.model.graph, _Dims(bindings or {}), _Dims(bindings or {})
        consumers, nodes = uses(graph), list(graph)
        inputs = [v for v in graph.inputs if v.name not in self.weight_names]
        self._merges = find_merges(graph, self.weight_names)
        taken = self.weight_names - self._merges.absorbed
        alone = [v for v in (*graph.inputs, *graph.initializers.values()) if v.name in taken]
        weights = [(v, self._weight_spec(v, consumers)) for v in (*alone, *(n.outputs[0] for n in self._merges.parts))]
        constants = {str(v.name): v for v in graph.initializers.values() if v.name not in self.weight_names}
        border = max((i for i, n in enumerate(nodes) if self._is_call(n)), default=0)
        for index, node in enumerate(nodes):
            if self._is_call(node):
                self._private(node, own if index < border else dims, f"{name}_{node.op_type}")
        # A stored weight that is cast is a weight on both sides of the border, not a value that crosses it.
        casts = [n for n in nodes if n.op_type == "Cast" and origin(n.outputs[0]).name in self.weight_names]
        layers = _Section.of(nodes[:border], nodes[border:], casts, weights, list(graph.outputs))
        key = ("layers", tuple(sorted(own.bindings.items())), tuple(str(v.name) for v in layers.outputs))
        if border and key not in self._privates:
            self._privates[key] = self._function(
                f"{name}_layers", layers.nodes, inputs, [own.spec(v) for v in inputs], layers.weights, layers.outputs,
                constants, own, private=True,
            )  # fmt: skip

        def before_the_head(env: dict[str, Any]) -> None:
            given = [env[str(v.name)] for v in inputs]
            held = [env[str(v.name)].var for v, _ in layers.weights]
            results = self._privates[key].call(self.builder, given, held, len(layers.outputs))
            env.update(zip((str(v.name) for v in layers.outputs), results, strict=True))

        return self._function(
            name, [*casts, *nodes[border:]], inputs, [dims.spec(v) for v in inputs], weights, list(graph.outputs),
            constants, dims, private=False, prelude=before_the_head if border else None,
        )  # fmt: skip

    def _is_call(self, node: ir.Node) -> bool:
        return (node.domain, node.op_type) in self._callees

    def _weight_spec(self, value: ir.Value, consumers: Any) -> WeightSpec:
        """What the weight `value` of the main graph is, and how it is packed; `value` may be the Concat of several."""
        tensors = self._tensors(value)
        return self._spec(str(value.name), [str(t.name) for t in tensors], tensors, consumers)

    def _formal_spec(self, formal: ir.Value, actual: ir.Value, consumers: Any) -> WeightSpec:
        """The same for a function's input: shapes from what is passed, names from the function, equal for all calls."""
        tensors, name = self._tensors(actual), str(formal.name)
        names = [name] if len(tensors) == 1 else [f"{name}.{i}" for i in range(len(tensors))]
        return self._spec(name, names, tensors, consumers)

    def _tensors(self, value: ir.Value) -> list[ir.Value]:
        producer = value.producer()
        return self._merges.parts.get(producer, [value]) if producer is not None else [value]

    def _spec(self, value: str, names: list[str], tensors: list[ir.Value], consumers: Any) -> WeightSpec:
        layout, groups = layout_of(value, consumers, self._callees)
        if layout == Layout.LINEAR and not self.pack_weights:
            layout = Layout.ROWS
        dtype = "int64" if str(tensors[0].dtype) == "INT64" else self.storage.of(layout)
        if dtype == "native":
            dtype = native_storage(layout, [stored_in_checkpoint(t) for t in tensors])
        shapes = [tuple(int(d) for d in t.shape) for t in tensors]  # type: ignore[union-attr, arg-type]
        if len(tensors) == 1:
            return WeightSpec(names[0], layout, shapes[0], groups, dtype)
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        return WeightSpec(merged_name(names), layout, shape, groups, dtype, tuple(zip(names, shapes, strict=True)))

    def _private(self, call: ir.Node, dims: _Dims, name: str) -> ImportedFunction:
        """The private Relax function of a model-local function for the argument types of `call`."""
        callee = self._callees[(call.domain, call.op_type)]
        function, consumers = callee.function, callee.consumers
        types, weights, inputs = [], [], []
        for formal, actual in zip(function.inputs, call.inputs, strict=True):
            assert actual is not None
            source = origin(actual)
            if source.name in self.weight_names or source.producer() in self._merges.parts:
                weights.append((formal, self._formal_spec(formal, source, consumers)))
            else:
                inputs.append(formal)
                types.append(dims.spec(actual))
        distinct = None if self.share_layers else call.name
        key = (
            call.domain,
            call.op_type,
            distinct,
            tuple((s.shape, s.dtype) for s in types),
            tuple(s for _, s in weights),
        )
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
        dims: _Dims, private: bool, prelude: Callable[[dict[str, Any]], None] | None = None,
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
        notes = None if self.share_layers else {"v4c.import": len(self._privates)}  # equal functions would be one
        with self._scope(name, parameters, private, notes):
            with self.builder.dataflow():
                if prelude:
                    prelude(env)
                for node in nodes:
                    if node not in self._merges.skipped:
                        self._node(node, env, dims)
                results = [self.tensor(env[str(v.name)]) for v in outputs]
                results = [self._updated.get(r, r) for r in results]
                places = {p: i for i, p in enumerate(parameters)}
                passed = {i: places[r] for i, r in enumerate(results) if private and r in places}
                returned = [r for i, r in enumerate(results) if i not in passed]
                out = self.builder.emit_output(relax.Tuple(returned))
            var = self.builder.emit_func_output(out)
        return ImportedFunction([str(v.name) for v in inputs], [w for _, w in weights], var, passed)

    @contextlib.contextmanager
    def _scope(self, name: str, parameters: list[Any], private: bool, notes: Any) -> Iterator[None]:
        """The builder's function scope; an error closes its last block, which TVM's own scope leaves open."""
        try:
            with self.builder.function(name, parameters, notes, private=private):
                yield
        except BaseException:
            self.builder._end_block()
            raise

    def _node(self, node: ir.Node, env: dict[str, Any], dims: _Dims) -> None:
        args = [env[str(v.name)] if v is not None else None for v in node.inputs]
        attributes = {name: _attribute(a) for name, a in node.attributes.items()}
        if self._is_call(node):
            results = self._call(node, args, dims)
        elif (node.domain, node.op_type) == (DOMAIN, "RMSNormLinear"):  # a product: its outputs follow its weight
            results = rms_norm_linear(self, args, attributes, len(node.outputs))
        elif node.domain == DOMAIN and node.op_type in OPS:
            results = self._custom(OPS[node.op_type], args, attributes, read=any(v.uses() for v in node.outputs))
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
        return function.call(self.builder, tensors, weights, len(node.outputs))

    def _custom(self, op: CustomOp, args: list[Any], attributes: dict[str, Any], read: bool) -> list[Any]:
        # Kernels see a packed weight; the op's shape rule sees what the graph sees.
        logical = [TensorSpec(a.spec.shape, a.spec.dtype) if isinstance(a, WeightUse) else None for a in args]
        variables = [self.tensor(a) for a in args]
        specs = [spec or spec_of(v) for spec, v in zip(logical, variables, strict=True)]
        kernel = self.kernel(self.kernels.custom(op, specs, attributes), op.name, len(specs))
        results = op.to_relax(self.builder, kernel, variables, specs, attributes)
        # A function need not return state that was updated in its own argument. An op that gives nothing else must be
        # returned all the same: what nothing reads is dead code.
        for index, result in zip(op.inplace_indices, results, strict=True):
            if index >= 0 and read:
                self._updated[result] = self._updated.get(variables[index], variables[index])
        return results

    def tensor(self, value: Any) -> Any:
        """A Relax variable for any value of the environment: constants are embedded, plain weights are parameters."""
        if isinstance(value, WeightUse):
            return value.var
        if isinstance(value, Parts):
            return self.builder.emit(relax.op.concat(list(value.tensors), axis=-1))
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


@dataclass(frozen=True)
class _Section:
    """Nodes of a graph that become a function: with the weights they read, and what they give to the rest."""

    nodes: list[ir.Node]
    weights: list[tuple[ir.Value, WeightSpec]]
    outputs: list[ir.Value]

    @classmethod
    def of(
        cls, nodes: list[ir.Node], rest: list[ir.Node], casts: list[ir.Node],
        weights: list[tuple[ir.Value, WeightSpec]], outputs: list[ir.Value],
    ) -> _Section:  # fmt: skip
        read = {origin(v) for n in nodes for v in n.inputs if v is not None}
        made = [v for n in nodes if n not in casts for v in n.outputs]
        wanted = {v for n in rest for v in n.inputs if v is not None} | set(outputs)
        return cls(nodes, [(v, w) for v, w in weights if v in read], [v for v in made if v in wanted])


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


_DTYPES = {
    "FLOAT": "float32", "INT64": "int64", "BFLOAT16": "bfloat16", "FLOAT16": "float16", "BOOL": "bool",
    "UINT8": "uint8",
}  # fmt: skip


def spec_of(var: Any) -> TensorSpec:
    """Shape and dtype of a Relax variable."""
    return TensorSpec(tuple(var.ty.shape.values), str(var.ty.dtype))


def _identifier(value: ir.Value) -> str:
    return "".join(c if c.isalnum() else "_" for c in str(value.name))


def _attribute(attribute: Any) -> Any:
    value = attribute.value
    return value.numpy() if attribute.type == ir.AttributeType.TENSOR else value
