"""The ordered lists of passes, and why they stand in this order.

On the ONNX graph, patterns of standard operators become custom ops, because kernels are chosen at import. On the Relax
module that the import gives, what is left is: fuse the elementwise operators around the kernels, make memory explicit,
and lower to the virtual machine. ONNX passes and optional phases can be switched off by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from v4c.errors import UnsupportedError

from .onnx.fuse_swiglu import FuseSwiGLU
from .onnx.rewriting import GraphPass, PassReport


@dataclass(frozen=True)
class Phase:
    """Some TVM passes that belong together.

    Attributes:
        name: what the phase does; the name that ``--disable-pass`` takes.
        passes: names in `tvm.relax.transform`, in order, with the arguments that are not defaults.
        optional: whether a module can be built without it.
    """

    name: str
    passes: tuple[tuple[str, dict[str, Any]], ...]
    optional: bool = False


def _plain(*names: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    return tuple((name, {}) for name in names)


PHASES = (
    # Operators that are not kernels become loops; nothing after this understands operators. Reshapes stay operators:
    # the virtual machine does them as views, and as loops they would be planned as copies.
    Phase("legalize", (("LegalizeOps", {"skip_ops": ["relax.reshape"]}), ("AnnotateTIROpPattern", {}))),
    Phase("fold-constants", _plain("FoldConstant"), optional=True),
    # Neighbouring elementwise loops become one; it reads the patterns annotated above.
    Phase("fuse-elementwise", _plain("FuseOps", "FuseTIR"), optional=True),
    Phase("remove-dead-code", _plain("DeadCodeElimination"), optional=True),
    # Every tensor's memory becomes explicit, and storage whose tensor is dead is used again.
    Phase("plan-memory", _plain("ToNonDataflow", "RemovePurityChecking", "CallTIRRewrite", "StaticPlanBlockMemory")),
    Phase("lower-to-vm", _plain("LowerAllocTensor", "KillAfterLastUse", "LowerRuntimeBuiltin", "ComputePrimValue",
                                "VMShapeLower", "AttachGlobalSymbol")),
)  # fmt: skip


ONNX_PASSES: tuple[type[GraphPass], ...] = (FuseSwiGLU,)
"""Passes over the ONNX graph, first to last."""


@dataclass(frozen=True)
class PassOptions:
    """What the user asked of the pipeline.

    Attributes:
        disabled: names of ONNX passes and optional phases to leave out.
        observe: told (file name, text) of the graph before and after each ONNX pass, and of the module after import and
            after each phase; texts are made only if it is set.
    """

    disabled: frozenset[str] = frozenset()
    observe: Callable[[str, str], None] | None = None

    @classmethod
    def checked(cls, disabled: Collection[str], observe: Callable[[str, str], None] | None = None) -> PassOptions:
        """Options with names checked; UnsupportedError lists the passes that can be switched off."""
        known = [p.pass_name for p in ONNX_PASSES] + [p.name for p in PHASES if p.optional]
        for name in disabled:
            if name not in known:
                raise UnsupportedError(f"pass {name!r}: cannot be disabled; expected one of {', '.join(known)}")
        return cls(frozenset(disabled), observe)


def run_onnx_passes(model: ir.Model, options: PassOptions) -> list[PassReport]:
    """Rewrite `model` in place by every ONNX pass that is not disabled; what each did."""

    def observe(number: int, name: str) -> None:
        if options.observe:
            options.observe(f"onnx-{number:02d}-{name}.txt", onnx.printer.to_text(ir.to_proto(model)))

    observe(0, "export")
    reports = []
    for number, make in enumerate((p for p in ONNX_PASSES if p.pass_name not in options.disabled), start=1):
        reports.append(make().run(model))
        observe(number, make.pass_name)
    return reports


def relax_pipeline(target: Any, options: PassOptions) -> Any:
    """The phases as one module pass for `relax.build`."""
    import tvm
    from tvm import relax

    def observe(number: int, name: str, module: Any) -> None:
        if options.observe:
            options.observe(f"relax-{number:02d}-{name}.py", module.script(show_meta=False))

    @tvm.transform.module_pass(opt_level=0)
    def pipeline(module: Any, context: Any) -> Any:
        with target:
            observe(0, "import", module)
            for number, phase in enumerate((p for p in PHASES if p.name not in options.disabled), start=1):
                for name, arguments in phase.passes:
                    module = getattr(relax.transform, name)(**arguments)(module)
                observe(number, phase.name, module)
        return module

    return pipeline
