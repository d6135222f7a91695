"""Arguments to measure a kernel with: random data of the sizes and kinds that a model would pass.

A kernel's argument is recognised by its name in the PrimFunc. Positions lie `CONTEXT` tokens into a sequence, choices
of experts are distinct, chosen rows are rows that exist.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

CONTEXT = 4096
"""Tokens before the ones that are measured."""

COLD_BYTES = 64 << 20
"""Calls take turns with copies of their arguments of together as much, so that weights come from memory as they do
where a model has other layers; but for kernels so small that it would take more than `MOST_COPIES`."""
MOST_COPIES = 16

MOST_BYTES = 1 << 30
"""A kernel with more weights is measured with fewer experts."""


def fewer_experts(arguments: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], int]:
    """A kernel's arguments and row count such that its weights find room, with as many tokens for each expert.

    Args:
        arguments: static sizes by name; those of experts are ``experts``, ``d``, ``f`` and ``top_k``.
        rows: tokens.
    """
    found = dict(arguments)
    if not {"experts", "d", "f", "top_k"} <= found.keys():
        return found, rows
    experts = found["experts"]
    fit = max(found["top_k"], min(experts, MOST_BYTES // (12 * found["d"] * found["f"])))
    found["experts"] = fit
    return found, max(1, round(rows * fit / experts))


class Calls:
    """Endless calls of a compiled function with `rows` rows, on copies of random arguments in turn.

    Args:
        function: its PrimFunc, for names, shapes and dtypes.
        arguments: the factory's, by name.
        rows: tokens of the one sequence.
    """

    def __init__(self, function: Any, arguments: Mapping[str, Any], rows: int) -> None:
        self._function, self._arguments = function, arguments
        compressed = -(-(CONTEXT + rows) // int(arguments.get("ratio", 4)))
        self._sizes = {"rows": rows, "b": 1, "s": rows, "n": compressed}
        rng = np.random.default_rng(rows)
        first = self._tensors(rng)
        held = sum(t.numpy().nbytes for t in first)
        copies = max(1, min(MOST_COPIES, COLD_BYTES // max(1, held)))
        self._sets: Iterator[list[Any]] = itertools.cycle([first, *(self._tensors(rng) for _ in range(copies - 1))])

    def next(self) -> list[Any]:
        """Arguments for the next call."""
        return next(self._sets)

    def _tensors(self, rng: np.random.Generator) -> list[Any]:
        import tvm

        return [tvm.runtime.tensor(self._array(p, rng)) for p in self._function.params]

    def _array(self, param: Any, rng: np.random.Generator) -> np.ndarray:
        from tvm import tirx

        shape = tuple(int(d) if isinstance(d, tirx.IntImm) else self._sizes[d.name] for d in param.ty.shape)
        dtype = str(param.ty.dtype)
        if dtype == "int64":
            return self._integers(param.name, shape, rng)
        if dtype == "uint8":  # quantised weights; as a float16, which their scales are, this is at most 2
            return rng.integers(0, 0x40, shape, np.uint8)
        values = rng.standard_normal(shape, np.float32)
        values *= 0.1
        return values.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else values

    def _integers(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        if name.startswith("positions"):
            return np.full(shape, CONTEXT, np.int64)
        if name.startswith("lengths"):
            return np.full(shape, self._sizes["s"], np.int64)
        if name.startswith("indices"):
            below = int(self._arguments.get("experts", self._sizes["n"]))
            chosen = [rng.permutation(below)[: shape[-1]] for _ in range(int(np.prod(shape[:-1])))]
            return np.resize(np.array(chosen, np.int64), shape)
        return np.zeros(shape, np.int64)  # an output
