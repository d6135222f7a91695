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

from .measure import Figures, measure_onnx, measure_relax
from .onnx.fuse_derotation import FuseDerotation
from .onnx.fuse_experts import FuseExperts
from .onnx.fuse_index_rope import FuseIndexRope
from .onnx.fuse_mhc_norm import FuseMHCNorm
from .onnx.fuse_mhc_post_pre import FuseMHCPostPre
from .onnx.fuse_norm_projection import FuseNormProjection
from .onnx.fuse_rms_norm import FuseRMSNorm
from .onnx.fuse_rope import FuseRope
from .onnx.fuse_rotary_query_kv import FuseRotaryQueryKV
from .onnx.fuse_router import FuseRouter
from .onnx.fuse_shared_expert import FuseSharedExpert
from .onnx.fuse_swiglu import FuseSwiGLU
from .onnx.fuse_topk_router import FuseTopKRouter
from .onnx.hoist_token_work import HoistTokenWork
from .onnx.hoisting import type_inputs
from .onnx.merge_compressors import MergeCompressors
from .onnx.merge_projections import MergeProjections
from .onnx.open_layer_borders import OpenLayerBorders
from .onnx.rewriting import OnnxPass, PassReport
from .onnx.split_hash_route import SplitHashRoute


@dataclass(frozen=True)
class Phase:
    """Some TVM passes that belong together.

    Attributes:
        name: what the phase does; the name that ``--disable-pass`` takes.
        passes: names in `tvm.relax.transform` or of a pass of ours, in order, with the arguments that are not defaults.
        optional: whether a module can be built without it.
    """

    name: str
    passes: tuple[tuple[str, dict[str, Any]], ...]
    optional: bool = False


def _plain(*names: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    return tuple((name, {}) for name in names)


SPECIALISE_DECODE = "specialise-decode"

PHASES = (
    # While kernels are still called by the shapes of tensors. The import has made the function it works on.
    Phase(SPECIALISE_DECODE, _plain("SpecialiseKernels"), optional=True),
    # Operators that are not kernels become loops; nothing after this understands operators. Reshapes stay operators:
    # the virtual machine does them as views, and as loops they would be planned as copies.
    Phase("legalize", (("LegalizeOps", {"skip_ops": ["relax.reshape"]}), ("AnnotateTIROpPattern", {}))),
    Phase("fold-constants", _plain("FoldConstant"), optional=True),
    # Neighbouring elementwise loops become one; it reads the patterns annotated above.
    Phase("fuse-elementwise", _plain("FuseOps", "FuseTIR"), optional=True),
    Phase("remove-dead-code", _plain("DeadCodeElimination"), optional=True),
    # Every tensor's memory becomes explicit, and storage whose tensor is dead is used again. A target that runs kernels
    # beside others says so in between: from there on order counts, and memory is not planned yet.
    Phase("plan-memory", _plain(
        "ToNonDataflow", "RemovePurityChecking", "CallTIRRewrite", "RunBeside", "StaticPlanBlockMemory",
    )),
    # The checks of arguments keep no text of where they fail: it is most of a library, and grows with every layer.
    Phase("lower-to-vm", (
        *_plain("LowerAllocTensor", "KillAfterLastUse", "LowerRuntimeBuiltin", "ComputePrimValue"),
        ("VMShapeLower", {"emit_err_ctx": False}),
        *_plain("DropArgumentChecks"),
        *_plain("AttachGlobalSymbol"),
    )),
)  # fmt: skip


ONNX_PASSES: tuple[type[OnnxPass], ...] = (
    # Spellings in standard operators become the operators that the passes below know. The experts' own SwiGLU is part
    # of their spelling, so experts come before it.
    FuseRMSNorm,
    FuseRope,
    FuseRouter,
    FuseExperts,
    FuseSwiGLU,
    # The feed-forward half: the router takes its product in, the shared expert joins the routed ones.
    FuseTopKRouter,
    SplitHashRoute,
    FuseSharedExpert,
    # Attention and its indexer take over the norms and rotations around them.
    FuseRotaryQueryKV,
    FuseDerotation,
    FuseIndexRope,
    MergeCompressors,
    # What reads one input is joined once the fusions above have taken their own products out of the way, and before
    # norms are fused into products: one product is then all that reads a norm. A norm behind an mHC step belongs to
    # that step, which has the row at hand, so it goes first.
    FuseMHCNorm,
    MergeProjections,
    FuseNormProjection,
    # The steps between two layers meet in the main graph, where they become one.
    OpenLayerBorders,
    FuseMHCPostPre,
    # Last, when nothing looks for its patterns across the border any more.
    HoistTokenWork,
)
"""Passes over the ONNX graph, first to last."""

SHARE_LAYERS = "share-layers"
PACK_WEIGHTS = "pack-weights"
IMPORT_CHOICES = (SHARE_LAYERS, PACK_WEIGHTS)
"""Choices of the import: one function for all layers of a kind; projections packed for their kernel."""

OPTIONAL = (*(p.pass_name for p in ONNX_PASSES), *IMPORT_CHOICES, *(p.name for p in PHASES if p.optional))
"""Every name of ours that ``--disable-pass`` takes, in the order in which they act."""

_order: list[type[OnnxPass]] = list(ONNX_PASSES)


def add_onnx_pass(new: type[OnnxPass], before: str | None = None) -> None:
    """Have every compilation of this process run another pass on the ONNX graph.

    Args:
        new: the class; its `pass_name` must not be taken. It is made anew for each run.
        before: the name of the pass it runs before; None: it runs last.

    Raises:
        UnsupportedError: the name is taken, or `before` is no pass on the ONNX graph.
    """
    names = [p.pass_name for p in _order]
    if new.pass_name in (*names, *OPTIONAL):
        raise UnsupportedError(f"pass {new.pass_name!r}: expected a name of its own, found one that is taken")
    if before is not None and before not in names:
        raise UnsupportedError(f"pass {before!r}: expected one of {', '.join(names)}")
    _order.insert(len(names) if before is None else names.index(before), new)


def remove_onnx_pass(name: str) -> None:
    """Take back what `add_onnx_pass` did."""
    _order[:] = [p for p in _order if p.pass_name != name or p in ONNX_PASSES]


@dataclass(frozen=True)
class Stage:
    """The graph or module after one pass.

    Attributes:
        name: number, level and pass, e.g. ``onnx-01-fuse-swiglu``.
        suffix: of a file that holds the text.
        text: the graph or module as text.
        figures: what it does in one decode step.
    """

    name: str
    suffix: str
    text: Callable[[], str]
    figures: Callable[[], Figures]


@dataclass(frozen=True)
class PassOptions:
    """What the user asked of the pipeline.

    Attributes:
        disabled: names of passes to leave out, of `OPTIONAL`.
        observe: shown the graph before and after each ONNX pass, and the module after import and after each phase.
    """

    disabled: frozenset[str] = frozenset()
    observe: Callable[[Stage], None] | None = None

    @classmethod
    def checked(cls, disabled: Collection[str], observe: Callable[[Stage], None] | None = None) -> PassOptions:
        """Options with names checked; UnsupportedError lists the passes that can be switched off."""
        for name in disabled:
            known = [*(p.pass_name for p in _order if p not in ONNX_PASSES), *OPTIONAL]
            if name not in known:
                raise UnsupportedError(f"pass {name!r}: cannot be disabled; expected one of {', '.join(known)}")
        return cls(frozenset(disabled), observe)


def run_onnx_passes(
    model: ir.Model, options: PassOptions, weights: Collection[str] = (), products: str = "float32"
) -> list[PassReport]:
    """Rewrite `model` in place by every ONNX pass that is not disabled; what each did.

    `weights`, their names, and `products`, what matrices are stored as, are for the figures an observer asks for.
    """

    def observe(number: int, name: str) -> None:
        if options.observe:
            options.observe(Stage(
                f"onnx-{number:02d}-{name}", ".txt", lambda: onnx.printer.to_text(ir.to_proto(model)),
                lambda: measure_onnx(model, frozenset(weights), products),
            ))  # fmt: skip

    type_inputs(model)
    observe(0, "export")
    reports = []
    for number, make in enumerate((p for p in list(_order) if p.pass_name not in options.disabled), start=1):
        reports.append(make().run(model))
        observe(number, make.pass_name)
    return reports


def relax_pipeline(target: Any, options: PassOptions, run_beside: Callable[[Any], Any] | None = None) -> Any:
    """The phases as one module pass for `relax.build`.

    `run_beside`, of a target that has a second stream, takes the module before memory is planned, every kernel called
    with its outputs as last arguments and no dataflow blocks left, and returns it with calls that change streams.
    """
    import tvm
    from tvm import relax

    from .relax.argument_checks import drop_argument_checks
    from .relax.specialise_kernels import specialise_kernels

    def ours(function: Any) -> Any:
        return lambda: tvm.transform.module_pass(function, opt_level=0)

    own = {
        "SpecialiseKernels": ours(specialise_kernels),
        "RunBeside": ours(lambda module, context: run_beside(module) if run_beside else module),
        "DropArgumentChecks": ours(drop_argument_checks),
    }

    def observe(number: int, name: str, module: Any, measured: Any) -> None:
        if options.observe:
            options.observe(Stage(
                f"relax-{number:02d}-{name}", ".py", lambda: module.script(show_meta=False),
                lambda: measure_relax(measured),
            ))  # fmt: skip

    @tvm.transform.module_pass(opt_level=0)
    def pipeline(module: Any, context: Any) -> Any:
        with target:
            observe(0, "import", module, module)
            for number, phase in enumerate((p for p in PHASES if p.name not in options.disabled), start=1):
                before = module
                for name, arguments in phase.passes:
                    make = own.get(name) or getattr(relax.transform, name)
                    module = make(**arguments)(module)
                # Instructions of the virtual machine have no shapes; they do what the module before them said.
                observe(number, phase.name, module, before if phase is PHASES[-1] else module)
        return module

    return pipeline
