"""The ordered list of passes over a Relax module, in phases, and why they stand in this order.

Kernels are chosen at import, so what is left is: fuse the elementwise operators around them, make memory explicit,
and lower to the virtual machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def relax_passes() -> list[Any]:
    """The passes after import, first to last."""
    from tvm import relax
    from tvm.tirx import transform as tir_transform

    t = relax.transform
    return [
        # 1. Operators that are not kernels yet become loops, and neighbouring elementwise ones one loop.
        t.LegalizeOps(),
        t.AnnotateTIROpPattern(),
        t.FoldConstant(),
        t.FuseOps(),
        t.FuseTIR(),
        t.DeadCodeElimination(),
        # 2. Reshapes become views before memory is planned, or they would be planned as copies.
        t.RewriteDataflowReshape(),
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
        # 3. Down to the virtual machine's instructions.
        t.LowerAllocTensor(),
        t.KillAfterLastUse(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(),
        t.AttachGlobalSymbol(),
    ]


def relax_pipeline(target: Any, observe: Callable[[int, str, Any], None] | None = None) -> Any:
    """The passes as one module pass for `relax.build`; `observe` is told (number, name, module) after each."""
    import tvm

    @tvm.transform.module_pass(opt_level=0)
    def pipeline(module: Any, context: Any) -> Any:
        with target:
            for number, step in enumerate(relax_passes()):
                module = step(module)
                if observe:
                    observe(number, step.info.name, module)
        return module

    return pipeline
