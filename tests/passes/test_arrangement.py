"""Axes followed through random chains of data movement, against NumPy doing the same movements."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from v4c.passes.onnx.arrangement import COPY, Atom, Axes, broadcast, labels, moved, product, sources
from v4c.passes.onnx.matching import new_constant

SIZES = {"a": 2, "b": 3, "c": 5}
COPIES = 7


def step(draw: st.DrawFn, value: ir.Value, data: np.ndarray) -> tuple[ir.Node, np.ndarray]:
    """A random movement of `data`, and the node that does it."""
    kind = draw(st.sampled_from(["Transpose", "Unsqueeze", "Squeeze", "Expand", "Flatten", "Reshape"]))
    rank, attributes = data.ndim, dict[str, Any]()
    parameter: list[int] | None = None
    if kind == "Transpose":
        perm = draw(st.permutations(range(rank)))
        attributes, data = {"perm": perm}, data.transpose(perm)
    elif kind == "Unsqueeze":
        axis = draw(st.integers(-rank - 1, rank))
        parameter, data = [axis], np.expand_dims(data, axis)
    elif kind == "Squeeze":
        ones = [i for i, d in enumerate(data.shape) if d == 1]
        parameter = ones[:1]
        data = data.squeeze(ones[0]) if ones else data
    elif kind == "Expand":
        ones = [i for i, d in enumerate(data.shape) if d == 1]
        parameter = [1] * rank
        if ones and COPIES not in data.shape:
            parameter[ones[-1]] = COPIES
        data = np.broadcast_to(data, np.broadcast_shapes(data.shape, parameter))
    elif kind == "Flatten":
        axis = draw(st.integers(0, rank))
        attributes, data = {"axis": axis}, data.reshape(int(np.prod(data.shape[:axis])), -1)
    else:  # merge two neighbours, with or without -1 for them, or split a merged axis as its atoms lie
        place = draw(st.integers(0, rank - 1))
        target = [*data.shape[:place], -1, *data.shape[place + 2 :]]
        data = data.reshape(target)
        parameter = list(data.shape) if draw(st.booleans()) else target
    inputs = [value] if parameter is None else [value, new_constant(np.array(parameter, np.int64)).outputs[0]]
    return ir.node(kind, inputs, attributes), data


def laid_out(axes: Axes, source: np.ndarray) -> np.ndarray:
    """What an array of these axes holds."""
    atoms = [a for group in axes for a in group]
    own = [a for a in atoms if a.label != COPY]
    names = list(SIZES)
    data = source.transpose([names.index(a.label) for a in own])
    for index, atom in enumerate(atoms):
        if atom.label == COPY:
            data = np.repeat(np.expand_dims(data, index), int(str(atom.size)), index)
    return data.reshape([int(np.prod([a.size for a in group], dtype=int)) for group in axes])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_axes_say_where_the_data_is(data: st.DataObject) -> None:
    source = np.arange(30).reshape(tuple(SIZES.values()))
    value = ir.Value(name="x", shape=ir.Shape(source.shape), type=ir.TensorType(ir.DataType.FLOAT))
    axes: Axes | None = tuple((Atom(n, s),) for n, s in SIZES.items())
    array, end = source, value
    for _ in range(data.draw(st.integers(1, 6))):
        node, array = data.draw(st.composite(step)(end, array))
        axes = moved(node, axes) if axes is not None else None
        end = node.outputs[0]
        end.shape = ir.Shape(array.shape)
        if axes is None:
            return  # not knowing is allowed; being wrong is not
    assert axes is not None
    np.testing.assert_array_equal(laid_out(axes, source), array)
    found = [a for v, a in sources(end, tuple(SIZES)) if v is value]
    assert axes in found


def test_the_usual_movements_are_followed() -> None:
    """A chain that must not end in not knowing: repeat each of three tokens, flatten, and back."""
    axes: Axes = ((Atom("t", "n"),), (Atom("d", 4),))
    value = ir.Value(name="x")
    for kind, parameter, expected in (
        ("Unsqueeze", [1], (("t",), (), ("d",))),
        ("Expand", [1, 3, 1], (("t",), (COPY,), ("d",))),
        ("Reshape", [-1, 4], (("t", COPY), ("d",))),
        ("Reshape", [-1, 3, 2, 2], None),  # cuts a row in two: no group of whole axes
        ("Reshape", [-1, 3, 4], (("t",), (COPY,), ("d",))),
    ):
        after = moved(ir.node(kind, [value, new_constant(np.array(parameter, np.int64)).outputs[0]]), axes)
        assert (labels(after) if after is not None else None) == expected
        axes = after or axes


def test_casts_move_data_only_where_they_keep_it() -> None:
    axes: Axes = ((Atom("t", 3),),)
    for source, target, kept in (
        (ir.DataType.FLOAT16, ir.DataType.FLOAT, True),
        (ir.DataType.INT64, ir.DataType.FLOAT, True),
        (ir.DataType.FLOAT, ir.DataType.FLOAT, True),
        (ir.DataType.FLOAT, ir.DataType.BFLOAT16, False),
        (ir.DataType.FLOAT, ir.DataType.INT64, False),
        (ir.DataType.DOUBLE, ir.DataType.FLOAT, False),
    ):
        value = ir.Value(name="x", type=ir.TensorType(source))
        assert (moved(ir.node("Cast", [value], {"to": target}), axes) is not None) == kept


def test_meeting_axes_must_be_the_same() -> None:
    t, d, e = (Atom(name, None) for name in "tde")  # type: ignore[arg-type]
    assert broadcast(((t,), ()), ((d,),)) == ((t,), (d,))
    assert broadcast(((t,), (d,)), ((t,), (e,))) is None
    assert product(((t,), (d,)), ((e,), (d,), ())) == ((e,), (t,), ())
    assert product(((t,), (d,)), ((e,), (t,), ())) is None
