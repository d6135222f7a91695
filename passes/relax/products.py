"""Conversion of norms and products with weights: one kernel each, with an output for each part of a merged weight."""

from __future__ import annotations

from functools import reduce
from operator import mul
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, tirx

from v4c.errors import UnsupportedError
from v4c.passes.cost import GROUPED_PRODUCT

from .layouts import Layout
from .values import Parts, WeightUse

if TYPE_CHECKING:
    from .importer import Importer

R = relax.op


def matmul(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    """MatMul: by a packed weight, by a block-diagonal one, or of two tensors."""
    x, weight = importer.tensor(args[0]), args[1]
    if not isinstance(weight, WeightUse) or weight.spec.layout == Layout.PLAIN:
        return [importer.builder.emit(R.matmul(x, importer.tensor(weight)))]
    if weight.spec.layout == Layout.GROUPED_LINEAR:
        return [_grouped(importer, x, weight)]
    if weight.spec.layout == Layout.ROWS:
        return [_unpacked(importer, x, weight)]
    return [_product(importer, x, weight, [], None)]


def rms_norm_linear(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    """RMSNormLinear: a product whose kernel normalises its input first."""
    x, norm, weight = importer.tensor(args[0]), importer.tensor(args[1]), args[2]
    if not isinstance(weight, WeightUse):
        raise UnsupportedError("RMSNormLinear: expected a weight as third input, found a tensor of run time")
    if weight.spec.layout != Layout.LINEAR:
        return [_unpacked(importer, _normed(importer, x, norm, float(attributes["eps"])), weight)]
    return [_product(importer, x, weight, [norm], float(attributes["eps"]))]


def rms_norm(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    """RMSNormalization over the last axis; a weight of ones is left out."""
    x, weight = importer.tensor(args[0]), args[1]
    if attributes.get("axis", -1) != -1:
        raise UnsupportedError(f"RMSNormalization: expected axis -1, found {attributes['axis']}")
    weighted = not (isinstance(weight, np.ndarray) and bool(np.all(weight == 1)))
    eps = float(attributes.get("epsilon", 1e-5))
    return [_normed(importer, x, importer.tensor(weight) if weighted else None, eps)]


def _normed(importer: Importer, x: Any, weight: Any, eps: float) -> Any:
    width = int(x.ty.shape.values[-1])
    flat, lead = importer.rows(x, width)
    inputs = [flat] if weight is None else [flat, weight]
    kernel = importer.kernels.rms_norm(width, eps, weight is not None)
    out = importer.builder.emit(R.call_tir(importer.kernel(kernel, "RMSNormalization", len(inputs)), inputs, flat.ty))
    return importer.builder.emit(R.reshape(out, [*lead, width]))


def _unpacked(importer: Importer, x: Any, weight: WeightUse) -> Any:
    n, k = weight.spec.shape
    flat, lead = importer.rows(x, k)
    kernel = importer.kernel(importer.kernels.linear_unpacked(n, k, weight.spec.dtype), "MatMul", 2)
    kind = relax.TensorType([flat.ty.shape.values[0], n], "float32")
    out = importer.builder.emit(R.call_tir(kernel, [flat, weight.var], kind))
    return importer.builder.emit(R.reshape(out, [*lead, n]))


def _product(importer: Importer, x: Any, weight: WeightUse, extra: list[Any], norm_eps: float | None) -> Any:
    """``x [..., K]`` times the transposed weight; `Parts` where the weight is merged."""
    spec = weight.spec
    sizes: tuple[int, ...]
    if spec.layout == Layout.LINEAR_KN:
        k, sizes = spec.shape[0], (spec.shape[1],)
    else:
        k, sizes = spec.shape[1], spec.sizes
    flat, lead = importer.rows(x, k)
    op = "MatMul" if norm_eps is None else "RMSNormLinear"
    kernel = importer.kernel(importer.kernels.linear(sizes, k, spec.dtype, norm_eps), op, 2 + len(extra))
    rows = flat.ty.shape.values[0]
    types = [relax.TensorType([rows, n], "float32") for n in sizes]
    out = importer.builder.emit(R.call_tir(kernel, [flat, *extra, weight.var], types if len(types) > 1 else types[0]))
    if len(sizes) == 1:
        return importer.builder.emit(R.reshape(out, [*lead, sizes[0]]))
    flats = [importer.builder.emit(relax.TupleGetItem(out, i)) for i in range(len(sizes))]
    return Parts(tuple(importer.builder.emit(R.reshape(f, [*lead, n])) for f, n in zip(flats, sizes, strict=True)))


def _grouped(importer: Importer, x: Any, weight: WeightUse) -> Any:
    """``x [..., G, 1, K] @ w [G, K, N]`` as one block-diagonal product."""
    groups = weight.spec.groups
    n, k = weight.spec.shape[0] // groups, weight.spec.shape[1]
    *lead, found, one, _ = x.ty.shape.values
    if (int(found), int(one)) != (groups, 1):
        raise UnsupportedError(f"grouped MatMul: expected [..., {groups}, 1, {k}], found {x.ty.shape}")
    rows = reduce(mul, lead, tirx.IntImm("int64", 1))
    flat = importer.builder.emit(R.reshape(x, [rows, groups, k]))
    kernel = importer.kernel(importer.kernels.grouped_linear(groups, n, k, weight.spec.dtype), GROUPED_PRODUCT, 2)
    kind = relax.TensorType([rows, groups, n], "float32")
    out = importer.builder.emit(R.call_tir(kernel, [flat, weight.var], kind))
    return importer.builder.emit(R.reshape(out, [*lead, groups, 1, n]))
