"""Hands kernels the memory that they need for themselves, as further outputs that nothing reads.

It is then planned with all other memory: shared between kernels, and at fixed places in a graph of launches. Memory
taken inside a kernel's host code would come from a pool that may move it, which a captured graph does not survive.
"""

from __future__ import annotations

from typing import Any

from tvm import IRModule, relax, sym, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from .launch import SCRATCH

_CALLS = ("relax.call_tir", "relax.call_tir_inplace")


@mutator
class _Provider(PyExprMutator):
    def __init__(self, module: IRModule) -> None:
        super().__init__(module)
        self.module = module

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if getattr(call.op, "name", "") not in _CALLS:
            return call
        kernel = self.module[call.args[0]]
        count = int(kernel.attrs[SCRATCH]) if kernel.attrs and SCRATCH in kernel.attrs else 0
        if not count:
            return call
        arguments = call.args[1]
        sizes = _sizes(kernel, arguments.fields)
        own = [_type(p, sizes) for p in list(kernel.params)[-count:]]
        outputs = call.ty_args[0]
        several = isinstance(outputs, relax.TupleType)
        made = [*(outputs.fields if several else [outputs]), *own]
        if call.op.name == "relax.call_tir":
            wider = relax.op.call_tir(call.args[0], arguments, made)
        else:
            places = [int(i) for i in call.attrs.inplace_indices]
            wider = relax.op.call_tir_inplace(call.args[0], arguments, [*places, *[-1] * count], made)
        out = self.builder_.emit(wider)
        parts = [self.builder_.emit(relax.TupleGetItem(out, i)) for i in range(len(made) - count)]
        return relax.Tuple(parts) if several else parts[0]


def _sizes(kernel: Any, arguments: Any) -> dict[Any, Any]:
    """What the kernel's symbolic dimensions are in a call with these first arguments."""
    sizes: dict[Any, Any] = {}
    for param, argument in zip(kernel.params, arguments, strict=False):
        for dim, found in zip(param.ty.shape, argument.ty.shape.values, strict=True):
            if isinstance(dim, tirx.Var):
                sizes.setdefault(dim, found)
    return sizes


def _type(param: Any, sizes: dict[Any, Any]) -> Any:
    analyzer = sym.Analyzer()  # simplifying replaces variables that are bound
    for variable, value in sizes.items():
        analyzer.bind(variable, value)
    return relax.TensorType([analyzer.simplify(dim) for dim in param.ty.shape], str(param.ty.dtype))


def provide_scratch(module: IRModule) -> IRModule:
    """`module` with every call of a kernel that counts `SCRATCH` arguments taking them as outputs."""
    provider = _Provider(module)
    for variable, function in module.functions.items():
        if isinstance(function, relax.Function):
            provider.builder_.update_func(variable, provider.visit_expr(function))
    return provider.builder_.finalize()
