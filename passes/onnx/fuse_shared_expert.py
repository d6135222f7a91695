"""``fuse-shared-expert``: a layer's routed experts and its shared one become one `MixtureOfExperts`."""

from __future__ import annotations

import onnx_ir as ir

from v4c.custom_ops import DOMAIN
from v4c.custom_ops.clamped_swiglu import CLAMPED_SWIGLU
from v4c.custom_ops.grouped_experts import GROUPED_EXPERTS
from v4c.custom_ops.mixture_of_experts import MIXTURE_OF_EXPERTS

from .fuse_topk_router import Product, product_of
from .hoisting import hoist, parts
from .matching import Fusion, Mismatch, WalkPass, attribute, new_node, operand, operands
from .rewriting import PassReport


class FuseSharedExpert(WalkPass):
    """Before -> after, the operands of the Add in either order::

        routed = GroupedExperts(x, weights, indices, gate_up, down)
        hidden = ClampedSwiGLU(MatMul(x, Transpose(gate)), MatMul(x, Transpose(up)))
        y = Add(routed, MatMul(hidden, Transpose(shared_down)))

        y = MixtureOfExperts(x, weights, indices, gate_up, down, Concat(gate, up), shared_down)

    It stands after `fuse-swiglu`, which makes the second operator, and before `merge-projections`, which would join the
    two products. All experts are then computed in two launches instead of seven. In a function, the Concat of the
    weights moves to the calls: there the weights have names, and what is packed is decided.
    """

    pass_name = "fuse-shared-expert"
    anchors = frozenset(("Add",))

    def __init__(self) -> None:
        super().__init__()
        self._joins: set[ir.Node] = set()

    def run(self, model: ir.Model) -> PassReport:
        """Rewrite `model` in place."""
        report = super().run(model)
        for function in parts(model):
            joins = [n for n in function if n in self._joins]
            if joins:
                hoist(model, function, joins)
        return report

    def find(self, node: ir.Node) -> Fusion | None:
        """The routed experts and the shared one that `node` adds up."""
        for routed, shared in operands(node):
            experts = _custom(routed, GROUPED_EXPERTS.name)
            down = product_of(shared)
            swiglu = _custom(down.x, CLAMPED_SWIGLU.name) if down is not None else None
            products = [product_of(operand(swiglu, i)) for i in (0, 1)] if swiglu is not None else [None]
            gate, up = products[0], products[-1]
            if experts is None or down is None or swiglu is None or gate is None or up is None:
                continue
            x = operand(experts, 0)
            for product in (gate, up):
                if product.x is not x:
                    raise Mismatch(node, f"all experts to read {x.name}", f"the shared one reads {product.x.name}")
            limits = [attribute(n, "limit") for n in (experts, swiglu)]
            if None in limits or limits[0] != limits[1]:
                raise Mismatch(node, "one limit", f"{limits[0]} of the routed experts, {limits[1]} of the shared one")
            join = _join(node, gate, up)
            fused = new_node(
                MIXTURE_OF_EXPERTS.name, [*(operand(experts, i) for i in range(5)), join.outputs[0], down.weight],
                {"limit": limits[0]}, domain=DOMAIN,
            )  # fmt: skip
            self._joins.add(join)
            transposed = [p.transposed for p in (gate, up, down)]
            return Fusion([join, fused], {node.outputs[0]: fused.outputs[0]}, shared=transposed)
        return None


def _custom(value: ir.Value, name: str) -> ir.Node | None:
    """The custom op `name` that gives `value`."""
    node = value.producer()
    return node if node is not None and (node.domain, node.op_type) == (DOMAIN, name) else None


def _join(node: ir.Node, gate: Product, up: Product) -> ir.Node:
    """The Concat of the weights of `gate` and `up`.

    Raises:
        Mismatch: one is computed in the graph or read by others, or their sizes are not known and equal.
    """
    weights = [gate.weight, up.weight]
    for product in (gate, up):
        if product.weight.producer() is not None:
            raise Mismatch(node, f"{product.weight.name} to be a weight", "it is computed")
        if len(product.weight.uses()) > 1 or len(product.transposed.uses()) > 1:
            raise Mismatch(node, f"{product.weight.name} to be read by the shared expert only", "other readers")
    sizes = [[d for d in w.shape or () if isinstance(d, int)] for w in weights]
    if len(sizes[0]) != 2 or sizes[0] != sizes[1]:
        raise Mismatch(node, "gate and up weights of one known size", " and ".join(str(w.shape) for w in weights))
    rows, columns = sizes[0]
    join = new_node("Concat", weights, {"axis": 0}, shape=[2 * rows, columns])
    join.name = join.outputs[0].name = f"{node.name}.shared_gate_up"
    return join
