"""``specialise-decode``: kernels called with constant sizes become kernels of those sizes.

The step of one row and one token is imported with both dimensions bound to 1. Its tensors then have constant shapes,
so memory is planned once for all, and its kernels lose their loops over rows: blocks of rows that cannot occur are not
compiled, and parallel regions over one row are plain code.
"""

from __future__ import annotations

from typing import Any

from tvm import IRModule, relax, tirx
from tvm.ir.transform import PassContext
from tvm.relax.expr_functor import PyExprMutator, mutator

_CALLS = ("relax.call_tir", "relax.call_tir_inplace")


@mutator
class _Specialiser(PyExprMutator):
    def __init__(self, module: IRModule) -> None:
        super().__init__(module)
        self.module = module
        self.made: dict[tuple[Any, ...], Any] = {}

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if getattr(call.op, "name", "") not in _CALLS or not isinstance(call.args[1], relax.Tuple):
            return call
        kernel = self.module[call.args[0]]
        sizes = _constant_sizes(kernel, call.args[1].fields)
        if not sizes:
            return call
        key = (call.args[0].name_hint, *sorted((v.name, n) for v, n in sizes.items()))
        if key not in self.made:
            self.made[key] = self.builder_.add_func(_bound(kernel, sizes), f"{call.args[0].name_hint}_one")
        return relax.Call(call.op, [self.made[key], *call.args[1:]], call.attrs, call.ty_args, call.span)


def _constant_sizes(kernel: Any, arguments: Any) -> dict[Any, int]:
    """The kernel's symbolic dimensions that `arguments`, its first ones, have as constants."""
    sizes: dict[Any, int] = {}
    for param, argument in zip(kernel.params, arguments, strict=False):
        for dim, found in zip(param.ty.shape, argument.ty.shape.values, strict=True):
            if isinstance(dim, tirx.Var) and isinstance(found, tirx.IntImm):
                sizes[dim] = int(found)
    return sizes


def _bound(kernel: Any, sizes: dict[Any, int]) -> Any:
    """The kernel with those dimensions fixed."""
    buffers = {}
    for param in kernel.params:
        dims = list(param.ty.shape)
        if any(isinstance(d, tirx.Var) and d in sizes for d in dims):
            fixed = [tirx.IntImm("int64", sizes[d]) if isinstance(d, tirx.Var) and d in sizes else d for d in dims]
            buffers[param] = tirx.decl_buffer(fixed, str(param.ty.dtype), name=param.name)
    return kernel.specialize(buffers)


def specialise_kernels(module: IRModule, context: PassContext) -> IRModule:
    """`module` with a kernel of constant sizes wherever one is called with them."""
    specialiser = _Specialiser(module)
    for variable, function in module.functions.items():
        if isinstance(function, relax.Function):
            specialiser.builder_.update_func(variable, specialiser.visit_expr(function))
    return specialiser.builder_.finalize()
