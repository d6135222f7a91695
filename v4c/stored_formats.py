"""Which weights a source holds as FP8 or FP4, and as which floats the others: what ``--quant native`` keeps."""

from __future__ import annotations

from typing import Any

import numpy as np

from v4c.errors import CheckpointError
from v4c.frontend.config import ModelConfig
from v4c.frontend.names import tensor_specs
from v4c.frontend.native_layout import native_format
from v4c.passes.relax.layouts import WeightSpec
from v4c.targets.native_rows import NativeRows

_STORED = {"fp8": "fp8", "fp4": "fp4", "bf16": "bfloat16"}


def stored_formats(source: Any) -> dict[str, str]:
    """Storage dtype of every weight of floats by name: ``fp8``, ``fp4``, ``bfloat16`` or ``float32``.

    A config alone is taken to mean the published formats. FP8 and FP4 with scales that are no powers of two count as
    float32, and so do float16 weights.
    """
    if isinstance(source, ModelConfig):
        found: dict[str, str] = {name: native_format(name, info) for name, info in tensor_specs(source).items()}
    else:
        names = (*source.names(), *getattr(source, "mtp_specs", ()))
        found = {name: _stored(source, name) for name in names}
    return {name: _STORED.get(form, "float32") for name, form in found.items() if form != "int64"}


def _stored(source: Any, name: str) -> str:
    if hasattr(source, "source_dtype"):
        form = str(source.source_dtype(name))
        if form in ("fp8", "fp4"):
            matrix = source.tensor(name).matrices()[0]
            return form if matrix.scale.dtype != "F32" else "f32"
        return form
    if not hasattr(source, "tensor"):
        return "f32"
    kind = source.tensor(name).read(0, 0).dtype
    return "int64" if kind == np.int64 else "bf16" if kind.name == "bfloat16" else "f32"


def read_native(source: Any, weight: WeightSpec, names: tuple[str, ...], start: int, stop: int) -> NativeRows:
    """Codes and scales of some rows of a weight, or of some experts of a stack.

    Args:
        source: a checkpoint.
        weight: the whole weight.
        names: the tensors it is made from that are asked for; of several, all rows.
        start, stop: the run of rows of a single one.

    Raises:
        CheckpointError: a tensor of another shape, or data that is missing.
    """
    shapes, made = dict(weight.tensors), []
    for name in names:
        handle = source.tensor(name)
        if tuple(handle.shape) != tuple(shapes[name]):
            raise CheckpointError(f"{name}: expected shape {list(shapes[name])}, found {list(handle.shape)}")
        if len(handle.shape) == 2:
            made.append(_rows(handle.matrices()[0], *((start, stop) if len(names) == 1 else (0, handle.shape[0]))))
            continue
        experts = []
        for place in range(start, stop):
            parts = [_rows(matrix, 0, matrix.rows) for matrix in handle.matrices(place)]
            experts.append(_joined(parts, np.concatenate))
        made.append(_joined(experts, np.stack))
    return made[0] if len(made) == 1 else _joined(made, np.concatenate)


def _rows(matrix: Any, start: int, stop: int) -> NativeRows:
    """Rows of one matrix, each with scales of its own."""
    blocks = matrix.scales(start, stop)
    block = matrix.form.block_rows
    row = np.arange(start, stop) // block - start // block
    return NativeRows(matrix.codes(start, stop), blocks[row])


def _joined(parts: list[NativeRows], join: Any) -> NativeRows:
    return NativeRows(join([p.codes for p in parts]), join([p.scales for p in parts]))
