"""The table of kernels: operators from attributes, lookups by name, and what is no kernel left out."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from v4c.passes.cost import INPUTS_ATTRIBUTE, OP_ATTRIBUTE
from v4c.passes.relax.kernel_table import kernel_table


def test_every_kernel_has_its_operator_and_inputs() -> None:
    @T.prim_func
    def copy(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32"), z: T.Buffer((4,), "float32")):  # type: ignore[valid-type]
        for i in range(4):
            z[i] = x[i] + y[i]

    plain = copy.without_attr("global_symbol")
    ours = plain.with_attrs({OP_ATTRIBUTE: "MatMul", INPUTS_ATTRIBUTE: 1})
    functions = {
        "merged_linear_one": ours, "take": plain, "fused_take3_cast1": plain, "mistake": plain, "add": plain,
        "shape_func": plain.with_attr("tirx.is_host_func", True),
    }  # fmt: skip
    assert kernel_table(tvm.IRModule(functions)) == {
        "merged_linear_one": ["MatMul", 1], "take": ["Gather", 2], "fused_take3_cast1": ["Gather", 2],
        "mistake": ["", 2], "add": ["", 2],
    }  # fmt: skip
