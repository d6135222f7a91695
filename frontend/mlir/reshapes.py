"""Spells every reshape of a traced graph as a merge and a split of neighbouring axes.

torch-mlir lowers `aten.view` on tensors with several dynamic dims by guessing which dims belong together, and some
guesses are silently wrong (a flatten of ``[?, ?, 4, 8]`` over its last two axes reads other elements). A merge and a
split of named axes become ``tensor.collapse_shape`` and ``tensor.expand_shape``, which leave nothing to guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

LEGAL = ("aten.flatten.using_ints", "aten.unflatten.int")
"""What torch-mlir must be told to leave alone: by default it turns both back into views."""

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default)


def respell(module: GraphModule) -> None:
    """Replace the reshapes of a traced module, in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _VIEWS:
            with graph.inserting_before(node):
                node.replace_all_uses_with(_merged_and_split(graph, node))
            graph.erase_node(node)
    graph.lint()
    module.recompile()


def changed_axes(before: Sequence[Any], after: Sequence[Any]) -> tuple[int, int, int]:
    """Which axes a reshape changes: those from `first`, `merged` of them before and `split` of them after.

    Args:
        before, after: the two shapes; sizes are ints or torch SymInts.

    Returns:
        first, merged and split; the axes around them are equal in both shapes.
    """
    most = min(len(before), len(after))
    first = next((i for i in range(most) if not _equal(before[i], after[i])), most)
    rest = most - first
    last = next((i for i in range(rest) if not _equal(before[-1 - i], after[-1 - i])), rest)
    return first, len(before) - first - last, len(after) - first - last


def _merged_and_split(graph: Graph, node: Node) -> Node:
    source, sizes = node.args[0], node.args[1]
    assert isinstance(source, Node)
    assert isinstance(sizes, list | tuple)
    value: torch.Tensor = source.meta["val"]
    first, merged, split = changed_axes(value.shape, node.meta["val"].shape)

    def emit(op: Any, *arguments: Any) -> None:
        nonlocal source, value
        shown = [a.meta["val"] if isinstance(a, Node) else a for a in arguments]
        value = op(value, *([s.meta["val"] if isinstance(s, Node) else s for s in a] if isinstance(a, list) else a
                            for a in shown))  # fmt: skip
        source = graph.call_function(op, (source, *arguments))
        source.meta["val"] = value

    if merged > 1:
        emit(_ATEN.flatten.using_ints, first, first + merged - 1)
    if split > 1:
        # One axis may have been left to be inferred; its size is known here.
        if merged == 0:
            emit(_ATEN.unsqueeze.default, first)
        emit(_ATEN.unflatten.int, first, list(sizes[first : first + split]))
    elif merged == 0 and split == 1:
        emit(_ATEN.unsqueeze.default, first)
    elif split == 0 and merged > 0:
        emit(_ATEN.squeeze.dim, first)
    assert isinstance(source, Node)
    return source


def _equal(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression; asking a SymInt itself would add a guard to the trace."""
    expressions = [s.node.expr if isinstance(s, torch.SymInt) else s for s in (a, b)]
    return bool(expressions[0] == expressions[1])
