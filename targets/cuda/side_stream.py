"""Engram rows are fetched on a side stream: from where their addresses are known until the layer that reads them.

The tables lie in host memory, so a lookup waits for PCIe and hardly uses the GPU; meanwhile the layers before its
reader run on the main stream. Every lookup moves right behind its hash, between calls of functions of the runtime
(`v4c.runtime.cuda_side_stream`) which send its launch to the side stream, and the main stream waits for it right before
the first call that takes its rows.

Whatever a lookup reads and writes belongs to the side stream until then. The call that joins takes it all as
arguments, so that memory planning and the virtual machine, for which there is one order of calls, keep it until there.
It works on the form between `CallTIRRewrite` and `StaticPlanBlockMemory`: order counts, and memory is not planned yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from tvm import IRModule, relax, tirx

from v4c.passes.cost import INPUTS_ATTRIBUTE, OP_ATTRIBUTE
from v4c.runtime.cuda_side_stream import FORK, JOIN, LEAVE

BESIDE = ("EngramLookup",)
"""Operators whose kernels run on the side stream."""


def run_beside(module: IRModule) -> IRModule:
    """`module` with every call of a kernel of `BESIDE` on the side stream, joined before its first reader."""
    inputs = {v.name_hint: _inputs(k) for v, k in module.functions.items() if _is_beside(k)}
    numbers = count()
    for variable, function in module.functions.items():
        if not isinstance(function, relax.Function):
            continue
        bindings = [b for block in function.body.blocks for b in block.bindings]
        lookups = [b for b in bindings if _called(b) in inputs]
        for lookup in lookups:
            bindings = _forked(bindings, lookup, inputs[_called(lookup)], next(numbers))
        if lookups:
            body = relax.SeqExpr([relax.BindingBlock(bindings)], function.body.body)
            module[variable] = relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
    return module


def _is_beside(kernel: Any) -> bool:
    attributes = kernel.attrs or {}
    return isinstance(kernel, tirx.PrimFunc) and OP_ATTRIBUTE in attributes and str(attributes[OP_ATTRIBUTE]) in BESIDE


def _inputs(kernel: Any) -> int:
    return int(kernel.attrs[INPUTS_ATTRIBUTE])


def _called(binding: Any) -> str:
    """The name of the kernel or function of the module that a binding calls; ``""`` if it calls none."""
    call = binding.value
    return call.op.name_hint if isinstance(call, relax.Call) and isinstance(call.op, relax.GlobalVar) else ""


def _forked(bindings: list[Any], lookup: Any, inputs: int, number: int) -> list[Any]:
    """`bindings` with one call moved up as far as what it reads allows, together with the memory it writes to.

    Between the fork and the launch stands nothing else: what the main stream was given later than the fork, and has
    given back since, could lie where the call writes.
    """
    made = {b.var for b in bindings}
    read = [a for a in lookup.value.args[:inputs] if a in made]
    written = list(lookup.value.args[inputs:])
    memory = [b for b in bindings if b.var in written]
    rest = [b for b in bindings if b is not lookup and b not in memory]
    known = max((i for i, b in enumerate(rest) if b.var in read), default=-1) + 1
    after = rest[known:]
    reader = next(_readers(after, written), len(after))
    return [
        *rest[:known], *memory, _call(FORK), lookup, _call(LEAVE, number),
        *after[:reader], _call(JOIN, number, *written, *read), *after[reader:],
    ]  # fmt: skip


def _readers(bindings: list[Any], tensors: list[Any]) -> Iterator[int]:
    """Where `tensors` are used, by any of their names."""
    names = set(tensors)
    for index, binding in enumerate(bindings):
        if names.isdisjoint(relax.analysis.free_vars(binding.value)):
            continue
        if isinstance(binding.value, relax.Var | relax.Tuple | relax.TupleGetItem):
            names.add(binding.var)
        else:
            yield index


def _call(name: str, *arguments: Any) -> Any:
    """A binding that calls a function of the runtime, for what it does."""
    given = [tirx.IntImm("int64", a) if isinstance(a, int) else a for a in arguments]
    call = relax.Call(relax.ExternFunc(name), given, None, [relax.ObjectType()])
    call = relax.BlockBuilder().normalize(call)
    return relax.VarBinding(relax.Var("_", call.ty), call)
