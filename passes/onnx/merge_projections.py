"""``merge-projections``: products of one input with several weights become one product with their joined weight.

Each weight alone is a launch and a pass over the input; joined they are one. The join is a Concat of weights, which
packing does, and the parts come back through a Split, which the importer turns into outputs of the one kernel.
"""

from __future__ import annotations

import onnx_ir as ir

from v4c.custom_ops import DOMAIN

from .hoisting import hoist, parts, stored_in_checkpoint
from .rewriting import PassReport


class MergeProjections:
    """``MatMul(x, Transpose(w_i))`` for two or more ``w_i [N_i, K]`` -> ``Split(MatMul(x, Transpose(Concat(w_i))))``.

    Weights that stay as a checkpoint stores them are joined with those of the same format only. The weights must be
    inputs of the function (or of the graph, or initializers), each read by its own product only. In a function, the
    Concat moves to the calls: there the weights have names, and what is packed is decided.
    """

    pass_name = "merge-projections"

    def run(self, model: ir.Model) -> PassReport:
        """Rewrite `model` in place."""
        merged = 0
        refusals: list[str] = []
        for function in parts(model):
            concats = self._merge(function, refusals)
            if concats:
                hoist(model, function, concats)
            merged += len(concats)
        merged += len(self._merge(model.graph, refusals))
        return PassReport(self.pass_name, merged, refusals)

    def _merge(self, graph: ir.Graph | ir.Function, refusals: list[str]) -> list[ir.Node]:
        """Merge within one graph; the Concats made."""
        products: dict[tuple[ir.Value | None, str], list[ir.Node]] = {}
        for node in graph:
            weight = _weight(node) if node.domain == "" and node.op_type == "MatMul" else None
            if weight is not None:
                products.setdefault((node.inputs[0], stored_in_checkpoint(weight)), []).append(node)
        fitting = [(x, nodes) for (x, _), nodes in products.items() if x is not None and self._fits(nodes, refusals)]
        return [self._join(graph, x, nodes) for x, nodes in fitting]

    def _fits(self, nodes: list[ir.Node], refusals: list[str]) -> bool:
        if len(nodes) < 2:
            return False
        for node in nodes:
            weight = _weight(node)
            assert weight is not None
            if len(weight.uses()) > 1:
                refusals.append(
                    f"{node.name}: expected {weight.name} to be read by this product only, "
                    f"found {len(weight.uses())} readers"
                )
                return False
        return True

    def _join(self, graph: ir.Graph | ir.Function, x: ir.Value, nodes: list[ir.Node]) -> ir.Node:
        weights = [_weight(n) for n in nodes]
        sizes = [int(w.shape[0]) for w in weights]  # type: ignore[union-attr, index, arg-type]
        first, label = nodes[0], f"{nodes[0].name}.merged"
        concat = ir.node("Concat", weights, {"axis": 0}, name=f"{label}.weights")
        transpose = ir.node("Transpose", concat.outputs, {"perm": [1, 0]}, name=f"{label}.transpose")
        product = ir.node("MatMul", [x, transpose.outputs[0]], name=label)
        lengths = ir.node("Constant", [], {"value": ir.tensor(sizes, dtype=ir.DataType.INT64)}, name=f"{label}.sizes")
        split = ir.node(
            "Split", [product.outputs[0], lengths.outputs[0]], {"axis": -1}, num_outputs=len(nodes),
            name=f"{label}.split",
        )  # fmt: skip
        columns = int(weights[0].shape[1])  # type: ignore[union-attr, index, arg-type]
        for node in (concat, transpose, product, lengths):
            node.outputs[0].name = str(node.name)
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        concat.outputs[0].shape = ir.Shape([sum(sizes), columns])
        for old, new in zip(nodes, split.outputs, strict=True):
            result = old.outputs[0]
            new.shape, new.type = result.shape, result.type
            result.replace_all_uses_with(new, replace_graph_outputs=True)
            new.name, result.name = result.name, f"{result.name}.alone"
        graph.insert_before(first, [concat, transpose, product, lengths, split])
        for old in nodes:
            transposed = old.inputs[1].producer()  # type: ignore[union-attr]
            graph.remove(old, safe=True)
            if transposed is not None and not transposed.outputs[0].uses():
                graph.remove(transposed, safe=True)
        return concat


def _weight(product: ir.Node) -> ir.Value | None:
    """The ``[N, K]`` weight of ``MatMul(x, Transpose(weight))``: a value nothing in the graph computes."""
    transpose = product.inputs[1].producer() if product.inputs[1] is not None else None
    if transpose is None or transpose.domain == DOMAIN or transpose.op_type != "Transpose":
        return None
    weight = transpose.inputs[0]
    if list(transpose.attributes["perm"].value) != [1, 0] or weight is None or weight.producer() is not None:
        return None
    return weight if weight.shape is not None and len(weight.shape) == 2 else None
