"""Engram lookup: the rows of a layer's embedding table at the hashed addresses, concatenated per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor
from torch.nn import functional

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define

v4c = Opset(DOMAIN, OPSET_VERSION)


def engram_lookup(table: Tensor, addresses: Tensor) -> Tensor:
    """Concatenate the table rows of each token's T hash heads (Engram paper, section 2.2).

    Args:
        table: ``[rows, e]`` float32, bfloat16 or float16: all heads' rows, one head after another.
        addresses: ``[B, S, T]`` int64, with the heads' offsets in them.

    Returns:
        ``[B, S, T * e]`` float32.
    """
    rows = functional.embedding(addresses, table).flatten(2)
    return rows.to(torch.promote_types(table.dtype, torch.float32))


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    batch, chunk, heads = inputs[1].shape
    return (TensorSpec((batch, chunk, heads * inputs[0].shape[1])),)


@script(v4c, default_opset=op)
def EngramLookup(table: FLOAT[...], addresses: INT64[...]) -> FLOAT[...]:
    # Reshape's 0 keeps B and S; the cast comes after the gather, so that only the rows found are converted.
    rows = op.Reshape(op.Gather(table, addresses), op.Constant(value_ints=[0, 0, -1]))
    return op.Cast(rows, to=1)


ENGRAM_LOOKUP = define(
    "EngramLookup",
    engram_lookup,
    inputs=("table", "addresses"),
    outputs=("embedding",),
    shape_rule=_shapes,
    functions=(EngramLookup,),
)
