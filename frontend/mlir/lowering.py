"""Lowers one torch module to one linalg function with torch-mlir; custom ops in it become calls of functions.

Each custom op is lowered on its own, once per signature, so that code does not grow with its uses and the text shows
the ops by name. Tensors have no memory behind them while tracing. Batch, chunk and cache capacities stay dynamic.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from v4c.custom_ops import DOMAIN, OPS
from v4c.errors import UnsupportedError

from .decompositions import FUNCTIONS
from .reshapes import LEGAL, respell

# Sizes to trace with, above any window and ratio. All that torch then takes for granted is that no dynamic dim, nor a
# count made of one, is 1; at 1 the lowered function does what it does at other sizes.
_SIZES = {"batch": 3, "chunk": 65537, "rows": 65539}
_NAMES = {size: name for name, size in _SIZES.items()}

_OPERATORS = {op.torch_op: name for name, op in OPS.items()}
_VERIFIER = re.compile(r",torch-verify-linalg-on-tensors-backend-contract\b")  # it knows of no calls between functions


@dataclass(frozen=True)
class Lowered:
    """One lowered function.

    Attributes:
        text: an MLIR module with the function, and declarations of those it calls.
        name: its symbol.
        arguments: MLIR types of the arguments.
        results: MLIR types of the results.
    """

    text: str
    name: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]


class Inputs:
    """Example inputs of one function, on torch's fake tensors: names, shapes and dynamic dims, but no memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def add(self, name: str, shape: Sequence[str | int], dtype: torch.dtype = torch.float32) -> None:
        """One more input; a str in `shape` is a dynamic dim: ``batch``, ``chunk`` or one that starts with ``rows``."""
        names = ["rows" if isinstance(d, str) and d.startswith("rows") else d for d in shape]
        # DUCK: dims of one size are one symbol, and each name has a size of its own.
        kinds = [DimDynamic.DUCK if isinstance(d, str) else DimDynamic.STATIC for d in names]
        example = torch.empty([_SIZES[d] if isinstance(d, str) else d for d in names], dtype=dtype, device="meta")
        fake = self.mode.from_tensor(
            example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds), source=ConstantSource(name)
        )
        with self.mode:
            self.tensors[name] = torch.empty(fake.shape, dtype=dtype)  # on the CPU, as what is made while tracing


class Library:
    """Functions lowered so far, those of custom ops among them, in the order of their first use."""

    def __init__(self) -> None:
        self.functions: list[Lowered] = []
        self._ops: dict[Any, str] = {}

    def lower(self, name: str, module: nn.Module, inputs: Inputs) -> Lowered:
        """Lower `module`, called with the inputs' tensors, as function `name`.

        Raises:
            UnsupportedError: torch-mlir cannot lower it.
        """
        from torch_mlir import fx
        from torch_mlir.compiler_utils import TorchMlirCompilerError
        from torch_mlir.extras.fx_decomp_util import get_decomposition_table

        tensors = list(inputs.tensors.values())
        try:
            with warnings.catch_warnings(), inputs.mode:
                warnings.simplefilter("ignore")  # torch's notes on its own deprecations
                traced = make_fx(module, get_decomposition_table(), _allow_non_fake_inputs=True)(*tensors)
                _drop_mutation(traced)
                respell(traced)
                nodes = [n for n in traced.graph.nodes if n.target in _OPERATORS]
            callees = [self._callee(node) for node in nodes]
            imported = fx.stateless_fx_import(traced, output_type="raw", model_name=name)
            _call(imported, callees)
            _to_linalg(imported)
        except TorchMlirCompilerError as error:
            reason = next((line for line in str(error).splitlines() if "error:" in line), str(error).splitlines()[0])
            raise UnsupportedError(f"{name}: expected torch-mlir to lower it to linalg, found: {reason}") from error
        kind = next(f.type for f in imported.body.operations if f.attributes["sym_name"].value == name)
        lowered = Lowered(str(imported), name, tuple(map(str, kind.inputs)), tuple(map(str, kind.results)))
        self.functions.append(lowered)
        return lowered

    def _callee(self, node: Node) -> str:
        """Name of the function that `node`, a custom op, calls; lowered if its signature is new."""
        op = _OPERATORS[node.target]
        values = [a.meta["val"] for a in node.args if isinstance(a, Node)]
        attributes = tuple(a for a in node.args if not isinstance(a, Node))
        shapes = [tuple(_NAMES[d.node.hint] if isinstance(d, torch.SymInt) else d for d in v.shape) for v in values]
        key = (op, attributes, tuple(shapes), tuple(v.dtype for v in values))
        if key not in self._ops:
            inputs = Inputs()
            for index, (shape, value) in enumerate(zip(shapes, values, strict=True)):
                inputs.add(f"{index}", shape, value.dtype)
            alike = sum(other[0] == op for other in self._ops)
            self._ops[key] = f"{op}_{alike}" if alike else op
            self.lower(self._ops[key], _Op(FUNCTIONS[op], attributes), inputs)
        return self._ops[key]


class _Op(nn.Module):
    def __init__(self, function: Callable[..., Any], attributes: tuple[Any, ...]) -> None:
        super().__init__()
        self.function, self.attributes = function, attributes

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors, *self.attributes)


def _drop_mutation(module: GraphModule) -> None:
    """Make new tensors of what torch's own decompositions (of ``rms_norm``) update in place."""
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for node, index in order.items():
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            updated = node.all_input_nodes[0]
            if any(order[user] > index for user in updated.users):
                raise UnsupportedError(f"{node.target}: expected a tensor that is used no more, found it used again")
            namespace, name = node.target._schema.name.split("::")
            packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"))
            node.target = getattr(packet, node.target._overloadname)
    module.recompile()


def _call(module: Any, callees: list[str]) -> None:
    """Turn the unknown operators of an imported module, in order, into calls of the functions `callees`."""
    from torch_mlir import ir
    from torch_mlir.dialects import func

    declared: dict[str, Any] = {}
    with module.context, ir.Location.unknown():
        (function,) = module.body.operations
        unknown = [op.operation for op in function.body.blocks[0].operations if op.operation.name == "torch.operator"]
        for op in unknown:
            if not op.attributes["name"].value.startswith(f"torch.{DOMAIN}."):
                raise UnsupportedError(f"{op.attributes['name'].value}: expected an operator torch-mlir knows")
        for op, callee in zip(unknown, callees, strict=True):
            tensors = [o for o in op.operands if str(o.type).startswith("!torch.vtensor")]
            kinds = [r.type for r in op.results]
            with ir.InsertionPoint(op):
                attributes = {"callee": ir.FlatSymbolRefAttr.get(callee)}
                call = ir.Operation.create("func.call", results=kinds, operands=tensors, attributes=attributes)
            for old, new in zip(op.results, call.results, strict=True):
                old.replace_all_uses_with(new)
            op.erase()
            declared.setdefault(callee, ir.FunctionType.get([t.type for t in tensors], kinds))
        with ir.InsertionPoint(module.body):
            for callee, kind in declared.items():
                func.FuncOp(callee, kind, visibility="private")


def _to_linalg(module: Any) -> None:
    """torch-mlir's two pipelines, without the last check of the second."""
    from torch_mlir.compiler_utils import run_pipeline_with_repro_report
    from torch_mlir.passmanager import PassManager

    backend = f"builtin.module(torchdynamo-export-to-torch-backend-pipeline{{backend-legal-ops={','.join(LEGAL)}}})"
    run_pipeline_with_repro_report(module, backend, "Lowering an imported graph")
    with module.context:
        passes = PassManager.parse("builtin.module(torch-backend-to-linalg-on-tensors-backend-pipeline)")
        pipeline, found = _VERIFIER.subn("", str(passes))
    assert found == 1, "torch-mlir's pipeline ends with its verifier"
    run_pipeline_with_repro_report(module, pipeline, "Lowering to linalg")
