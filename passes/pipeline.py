"""The ordered list of passes over a Relax module, in phases, and why they stand in this order.

Kernels are chosen at import, so what is left is: fuse the elementwise operators around them, make memory explicit,
and lower to the virtual machine. Optional phases can be switched off by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from v4c.errors import UnsupportedError


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


@dataclass(frozen=True)
class PassOptions:
    """What the user asked of the pipeline.

    Attributes:
        disabled: names of optional phases to leave out.
        observe: told (number, name, module) of the imported module (number 0) and after each phase.
    """

    disabled: frozenset[str] = frozenset()
    observe: Callable[[int, str, Any], None] | None = None

    @classmethod
    def checked(cls, disabled: Collection[str], observe: Callable[[int, str, Any], None] | None = None) -> PassOptions:
        """Options with names checked; UnsupportedError lists the passes that can be switched off."""
        known = [p.name for p in PHASES if p.optional]
        for name in disabled:
            if name not in known:
                raise UnsupportedError(f"pass {name!r}: cannot be disabled; expected one of {', '.join(known)}")
        return cls(frozenset(disabled), observe)


def relax_pipeline(target: Any, options: PassOptions) -> Any:
    """The phases as one module pass for `relax.build`."""
    import tvm
    from tvm import relax

    @tvm.transform.module_pass(opt_level=0)
    def pipeline(module: Any, context: Any) -> Any:
        with target:
            if options.observe:
                options.observe(0, "import", module)
            for number, phase in enumerate((p for p in PHASES if p.name not in options.disabled), start=1):
                for name, arguments in phase.passes:
                    module = getattr(relax.transform, name)(**arguments)(module)
                if options.observe:
                    options.observe(number, phase.name, module)
        return module

    return pipeline
