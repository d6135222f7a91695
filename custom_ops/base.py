"""What a v4c custom op is: one declaration from which the torch op, the ONNX node and the Relax call are made.

An op is declared once, in a module of its own, with `define`: its inputs, attributes and outputs, the rule that gives
the outputs' shapes, the torch reference, the ONNX function body, and which outputs are written over which inputs.
Everything else is derived here, so a new op is one module and one kernel per target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import onnxscript

DOMAIN = "v4c"
OPSET_VERSION = 1
ONNX_OPSET = 23
"""Version of the standard opset every function body uses; it must equal the exported model's."""

_TORCH_TYPES = {"float32": torch.float32, "int64": torch.int64}
_SCHEMA_TYPES = {int: "int", float: "float"}

_library = torch.library.Library(DOMAIN, "DEF")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor; a dimension is an int, a torch SymInt or a TVM PrimExpr."""

    shape: tuple[Any, ...]
    dtype: str = "float32"


Attributes = Mapping[str, "int | float"]
ShapeRule = Callable[[Sequence[TensorSpec], Attributes], tuple[TensorSpec, ...]]


@dataclass(frozen=True)
class CustomOp:
    """One operator of ONNX domain ``v4c``.

    Attributes:
        name: ONNX op type, unique across all domains (TVM's own importer ignores the domain).
        torch_name: the name under ``torch.ops.v4c``.
        inputs: input names in order; all are required.
        outputs: output names in order.
        attributes: attribute name to ``int`` or ``float``, in order; they follow the inputs in the torch signature.
        shape_rule: output specs from input specs and attributes.
        reference: the torch function; pure, takes inputs then attributes, returns a tensor or a tuple.
        functions: the ONNX function body first, then the helper functions it calls.
        writes: output name to the name of the input whose memory it takes over: state updated in place.
    """

    name: str
    torch_name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, type]
    shape_rule: ShapeRule
    reference: Callable[..., Any]
    functions: tuple[onnxscript.OnnxFunction, ...]
    writes: Mapping[str, str]

    @property
    def torch_op(self) -> Any:
        """The ``torch.ops`` overload that stands for this op in a traced graph."""
        return getattr(getattr(torch.ops, DOMAIN), self.torch_name).default

    @property
    def inplace_indices(self) -> list[int]:
        """Per output, the index of the input it is written over, or -1: what ``R.call_tir_inplace`` takes."""
        return [self.inputs.index(self.writes[o]) if o in self.writes else -1 for o in self.outputs]

    def onnx_translation(self) -> Callable[..., Any]:
        """The function that translates the torch op in `torch.onnx.export`: it emits one bare node of this op."""
        from onnxscript import values

        node = values.Op(values.Opset(DOMAIN, OPSET_VERSION), self.name, self.schema())
        signature = inspect.Signature(
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in (*self.inputs, *self.attributes)]
        )

        def translate(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            tensors = [bound[n] for n in self.inputs]
            return node(*tensors, **{n: kind(bound[n]) for n, kind in self.attributes.items()})

        translate.__signature__ = signature  # type: ignore[attr-defined]  # the exporter reads parameter names from it
        return translate

    def schema(self) -> Any:
        """The `onnx.defs.OpSchema` of the node: names, attribute types, doc; any mix of float and int64 tensors."""
        import onnx

        schema = onnx.defs.OpSchema
        kinds = ["tensor(float)", "tensor(bfloat16)", "tensor(float16)", "tensor(int64)"]
        constraints = [(f"T_{n}", kinds, "") for n in (*self.inputs, *(f"{o}_out" for o in self.outputs))]
        types = {int: schema.AttrType.INT, float: schema.AttrType.FLOAT}
        return schema(
            self.name,
            DOMAIN,
            OPSET_VERSION,
            doc=self.reference.__doc__ or "",
            inputs=[schema.FormalParameter(n, f"T_{n}") for n in self.inputs],
            outputs=[schema.FormalParameter(f"{o}_out", f"T_{o}_out") for o in self.outputs],
            type_constraints=constraints,
            attributes=[schema.Attribute(n, types[k], "") for n, k in self.attributes.items()],
        )

    def to_relax(
        self,
        builder: Any,
        kernel: Any,
        args: Sequence[Any],
        specs: Sequence[TensorSpec],
        attributes: Attributes,
    ) -> list[Any]:
        """Emit the Relax call of this op and return one Relax variable per output.

        Args:
            builder: the `tvm.relax.BlockBuilder` inside a dataflow block.
            kernel: GlobalVar of the target's PrimFunc; it takes the inputs, then the outputs that are not in place.
            args: Relax variables of the inputs.
            specs: what the inputs are to the graph: a weight packed for the kernel keeps its checkpoint shape here.
            attributes: the node's attributes.
        """
        from tvm import relax

        types = [relax.TensorType(s.shape, s.dtype) for s in self.shape_rule(specs, attributes)]
        if self.writes:
            out = builder.emit(
                relax.op.call_tir_inplace(
                    kernel, relax.Tuple(list(args)), inplace_indices=self.inplace_indices, out_ty=types
                )
            )
        else:
            out = builder.emit(relax.op.call_tir(kernel, list(args), types if len(types) > 1 else types[0]))
        if len(types) == 1:
            return [out]
        return [builder.emit(relax.TupleGetItem(out, i)) for i in range(len(types))]


OPS: dict[str, CustomOp] = {}
"""Every op by its ONNX name, filled as the op modules are imported."""


def define(
    name: str,
    reference: Callable[..., Any],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    shape_rule: ShapeRule,
    functions: Sequence[onnxscript.OnnxFunction],
    attributes: Mapping[str, type] | None = None,
    writes: Mapping[str, str] | None = None,
) -> CustomOp:
    """Declare an op: register its torch operator (named as `reference` is) with a fake kernel, and list it in `OPS`."""
    attributes = dict(attributes or {})
    torch_name = reference.__name__
    op = CustomOp(
        name, torch_name, tuple(inputs), tuple(outputs), attributes, shape_rule, reference, tuple(functions),
        dict(writes or {}),
    )  # fmt: skip

    parameters = [f"Tensor {n}" for n in inputs] + [f"{_SCHEMA_TYPES[k]} {n}" for n, k in attributes.items()]
    returns = "Tensor" if len(outputs) == 1 else "(" + ", ".join(["Tensor"] * len(outputs)) + ")"
    _library.define(f"{torch_name}({', '.join(parameters)}) -> {returns}")
    _library.impl(torch_name, reference, "CompositeExplicitAutograd")

    def fake(*args: Any) -> Any:
        specs = [TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in args[: len(op.inputs)]]
        rule = shape_rule(specs, dict(zip(attributes, args[len(op.inputs) :], strict=True)))
        made = tuple(args[0].new_empty(s.shape, dtype=_TORCH_TYPES[s.dtype]) for s in rule)
        return made if len(made) > 1 else made[0]

    torch.library.register_fake(f"{DOMAIN}::{torch_name}", fake, lib=_library)
    OPS[name] = op
    return op
