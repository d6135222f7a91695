"""Drops what the virtual machine keeps about each weight and cache: checks of its shape at every call, and its name.

`VMShapeLower` checks every argument of a public function. Weights come from a file whose manifest and hashes were
verified, in the shapes the library was compiled for, and caches are allocated by the runtime from the same manifest;
checking some thousand of them again costs a decode step time, and instructions and names are most of a deep model's
library. What stays is where a dimension is read that the code needs.
"""

from __future__ import annotations

from typing import Any

from tvm import IRModule, relax
from tvm.ir.transform import PassContext
from tvm.relax.expr_functor import PyExprMutator, mutator

_STORE = 1
"""In `vm.builtin.match_shape`, the code of a dimension that is kept for later use."""

_VECTORS = 3
"""Arguments that callers make anew for every call: input_ids, positions, lengths. They come first and stay checked."""


@mutator
class _Dropper(PyExprMutator):
    def __init__(self, module: IRModule, trusted: list[Any]) -> None:
        super().__init__(module)
        self.trusted = trusted

    def visit_binding_block_(self, block: Any) -> Any:
        kept = [b for b in block.bindings if not self._is_check(b)]
        return super().visit_binding_block_(relax.BindingBlock(kept))

    def _is_check(self, binding: Any) -> bool:
        call = binding.value
        if not isinstance(call, relax.Call) or not isinstance(call.op, relax.ExternFunc):
            return False
        name = call.op.global_symbol
        if name not in ("vm.builtin.check_tensor_info", "vm.builtin.match_shape"):
            return False
        if not any(call.args[0].same_as(v) for v in self.trusted):
            return False
        # After the tensor, the heap and the rank: a code and a number for each dimension, then a text.
        return name != "vm.builtin.match_shape" or _STORE not in [int(a.value) for a in call.args[3:-1:2]]


def drop_argument_checks(module: IRModule, context: PassContext) -> IRModule:
    """`module` as `VMShapeLower` leaves it, caches and weights unchecked and named by their number."""
    for variable, function in module.functions.items():
        if not isinstance(function, relax.Function):
            continue
        params = list(function.params)
        dropper = _Dropper(module, params[_VECTORS:])
        for index in range(_VECTORS, len(params)):
            params[index] = relax.Var(f"p{index}", params[index].ty)
            dropper.set_var_remap(function.params[index], params[index])
        body = dropper.visit_expr(function.body)
        module[variable] = relax.Function(params, body, function.ret_ty, function.is_pure, function.attrs)
    return module
