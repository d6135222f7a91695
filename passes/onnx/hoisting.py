"""Moves nodes across the border of a model-local function, from its body to the graph that calls it.

Passes use it where a pattern spans two layers, or where work depends on the tokens alone and can stand at the head of
the graph. Every call of the function is changed alike, so the function stays shared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from v4c.custom_ops import DOMAIN


def parts(model: ir.Model) -> Iterator[ir.Function]:
    """The model-local functions that are called from the main graph; bodies of custom ops are not among them."""
    called = {(n.domain, n.op_type) for n in model.graph if n.domain != DOMAIN}
    yield from [f for f in model.functions.values() if (f.domain, f.name) in called]


def calls(model: ir.Model, function: ir.Function) -> list[ir.Node]:
    """The calls of `function` in the main graph, in order."""
    return [n for n in model.graph if (n.domain, n.op_type) == (function.domain, function.name)]


STORED = "v4c.stored"
"""Metadata key of a weight: what the checkpoint stores it as. There only where that is to be kept."""


def stored_in_checkpoint(weight: ir.Value) -> str:
    """What the checkpoint stores a weight as; ``""`` where that makes no difference, or differs between calls."""
    return weight.metadata_props.get(STORED, "")


def type_inputs(model: ir.Model) -> None:
    """Give the inputs of called functions the shapes and types of what is passed: an ONNX file does not keep them.

    And the formats of weights that are to stay as they are stored, where all calls pass the same.
    """
    for function in parts(model):
        sites = calls(model, function)
        for index, formal in enumerate(function.inputs):
            stored = {stored_in_checkpoint(v) for v in (c.inputs[index] for c in sites) if v is not None}
            if len(stored) == 1 and stored != {""}:
                formal.metadata_props[STORED] = stored.pop()
        for call in sites:
            for formal, actual in zip(function.inputs, call.inputs, strict=True):
                if actual is not None:
                    formal.shape, formal.type = formal.shape or actual.shape, formal.type or actual.type


def hoist(model: ir.Model, function: ir.Function, nodes: Collection[ir.Node]) -> list[ir.Node]:
    """Move `nodes` before every call of `function`; what the rest of the body reads of them becomes inputs.

    Args:
        model: changed in place.
        function: called in the main graph only.
        nodes: nodes of `function` in order; they may read its inputs, each other and constants.

    Returns:
        The new nodes of the main graph.
    """
    moved = list(nodes)
    made = {value for node in moved for value in node.outputs}
    kept = [v for node in moved for v in node.outputs if v in function.outputs or any(
        use.node not in moved for use in v.uses())]  # fmt: skip
    sites = calls(model, function)
    clones = [clone for call in sites for clone in _clone_before(model, function, call, moved, made, kept)]
    for value in kept:
        formal = ir.Value(name=value.name, shape=value.shape, type=value.type)
        value.name = f"{value.name}.hoisted"
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, formal)
        for index, output in enumerate(function.outputs):
            if output is value:
                function.outputs[index] = formal
        function.inputs.append(formal)
    for node in reversed(moved):
        function.remove(node, safe=True)
    _drop_passed_outputs(model, function)
    _drop_unused_inputs(function, calls(model, function))
    return clones


def sink(model: ir.Model, function: ir.Function, node: ir.Node) -> None:
    """Move `node`, whose only output is an output of `function`, behind every call; what it reads becomes outputs."""
    (result,) = node.outputs
    position = next(i for i, v in enumerate(function.outputs) if v is result)
    computed = [v for v in node.inputs if v is not None and v not in function.inputs]
    for call in calls(model, function):
        old = list(call.outputs)
        whole = old[position]
        shape, kind = whole.shape, whole.type
        call.resize_outputs(len(old) + len(computed) - 1)
        outer: dict[ir.Value, ir.Value | None] = dict(zip(function.inputs, call.inputs, strict=True))
        outer |= dict(zip(computed, [whole, *call.outputs[len(old) :]], strict=True))
        for operand in computed:
            made = outer[operand]
            assert made is not None
            made.shape, made.type = operand.shape, operand.type
            if made is not whole:
                made.name = f"{whole.name}.{operand.name}"
        tail = ir.Node(node.domain, node.op_type, [], attributes=list(node.attributes.values()),
                       name=f"{call.name}.{node.name}")  # fmt: skip
        (moved,) = tail.outputs
        moved.shape, moved.type = shape, kind
        whole.replace_all_uses_with(moved, replace_graph_outputs=True)
        moved.name, whole.name = whole.name, f"{whole.name}.{computed[0].name}"
        tail.resize_inputs(len(node.inputs))
        for index, read in enumerate(node.inputs):
            tail.replace_input_with(index, outer[read] if read is not None else None)
        model.graph.insert_after(call, tail)
    function.outputs[position] = computed[0]
    function.outputs.extend(computed[1:])
    if not result.uses():
        function.remove(node, safe=True)


def _clone_before(
    model: ir.Model, function: ir.Function, call: ir.Node, moved: list[ir.Node], made: set[ir.Value],
    kept: list[ir.Value],
) -> list[ir.Node]:  # fmt: skip
    """Copies of `moved` before `call`, on the values it passes; the copies of `kept` become its last inputs."""
    actual = dict(zip(function.inputs, call.inputs, strict=True))
    copies: dict[ir.Value, ir.Value] = {}
    clones: list[ir.Node] = []

    def outer(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value in made or value in copies:
            return copies[value]
        if value in actual:
            return actual[value]
        producer = value.producer()
        assert producer is not None
        assert producer.op_type == "Constant", f"{value.name}: hoisted work reads it, and it stays"
        return copy(producer)[0]

    def copy(node: ir.Node) -> list[ir.Value]:
        clone = ir.Node(node.domain, node.op_type, [outer(v) for v in node.inputs],
                        attributes=list(node.attributes.values()), num_outputs=len(node.outputs),
                        name=f"{call.name}.{node.name}")  # fmt: skip
        for mine, theirs in zip(clone.outputs, node.outputs, strict=True):
            mine.name, mine.shape, mine.type = f"{call.name}.{theirs.name}", theirs.shape, theirs.type
            copies[theirs] = mine
        model.graph.insert_before(call, clone)
        clones.append(clone)
        return list(clone.outputs)

    for node in moved:
        copy(node)
    first = len(call.inputs)
    call.resize_inputs(first + len(kept))
    for index, value in enumerate(kept):
        call.replace_input_with(first + index, copies[value])
    return clones


def _drop_passed_outputs(model: ir.Model, function: ir.Function) -> None:
    """Where an output of the function is one of its inputs, its callers read what they pass instead."""
    passed = {i: function.inputs.index(v) for i, v in enumerate(function.outputs) if v in function.inputs}
    if not passed:
        return
    for call in calls(model, function):
        kept = [v for i, v in enumerate(call.outputs) if i not in passed]
        fresh = ir.Node(call.domain, call.op_type, call.inputs, attributes=list(call.attributes.values()),
                        num_outputs=len(kept), name=call.name)  # fmt: skip
        new = dict(zip(kept, fresh.outputs, strict=True))
        for index, old in enumerate(call.outputs):
            value = call.inputs[passed[index]] if index in passed else new[old]
            assert value is not None
            old.replace_all_uses_with(value, replace_graph_outputs=True)
            value.name, old.name = old.name, f"{old.name}.passed"
            value.shape, value.type = old.shape or value.shape, old.type or value.type
        model.graph.insert_before(call, fresh)
        model.graph.remove(call, safe=True)
    remaining = [v for i, v in enumerate(function.outputs) if i not in passed]
    function.outputs.clear()
    function.outputs.extend(remaining)


def _drop_unused_inputs(function: ir.Function, sites: list[ir.Node]) -> None:
    """Remove inputs that nothing in the body reads any more, from the function and from its calls."""
    used = [i for i, v in enumerate(function.inputs) if v.uses() or v in function.outputs]
    if len(used) == len(function.inputs):
        return
    for call in sites:
        values = [call.inputs[i] for i in used]
        for index, value in enumerate(values):
            call.replace_input_with(index, value)
        call.resize_inputs(len(values))
    kept = [function.inputs[i] for i in used]
    function.inputs.clear()
    function.inputs.extend(kept)
