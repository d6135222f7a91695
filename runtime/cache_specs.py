"""How the manifest describes caches: name, element type, and a shape in terms of batch and capacity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from v4c.runtime.dtypes import DTYPES
from v4c.runtime.fields import Fields


@dataclass(frozen=True)
class Rows:
    """A cache dimension that grows with the context: one row per ``ratio`` tokens."""

    ratio: int


Dim = int | str | Rows
"""A cache dimension: a fixed size, ``"batch"``, or `Rows`."""


@dataclass(frozen=True)
class CacheSpec:
    """One cache tensor; its first dimension is ``"batch"``, and only the second may be `Rows`.

    Without `Rows` it is a ring or another small state that is copied whole by a fork.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    @property
    def ratio(self) -> int | None:
        """Tokens per row when the cache grows with the context, else None."""
        return self.shape[1].ratio if len(self.shape) > 1 and isinstance(self.shape[1], Rows) else None

    def sizes(self, batch: int, max_context: int) -> tuple[int, ...]:
        """The shape for ``batch`` rows and ``max_context`` tokens; at least one row, so no tensor is empty."""
        return tuple(
            max(1, max_context // dim.ratio) if isinstance(dim, Rows) else batch if isinstance(dim, str) else dim
            for dim in self.shape
        )


def read_caches(fields: Fields) -> tuple[CacheSpec, ...]:
    """The list ``caches`` of an object of the manifest.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    caches = fields.take("caches", list, "a list")
    return tuple(_cache(Fields(cache, f"{fields.where}: caches[{i}]")) for i, cache in enumerate(caches))


def caches_json(caches: Iterable[CacheSpec]) -> list[dict[str, Any]]:
    """What `read_caches` reads."""
    return [
        {
            "name": cache.name,
            "dtype": cache.dtype,
            "shape": [{"rows": dim.ratio} if isinstance(dim, Rows) else dim for dim in cache.shape],
        }
        for cache in caches
    ]


def read_dtype(fields: Fields) -> str:
    """The key ``dtype``: one of `DTYPES`.

    Raises:
        ArtifactError: it is something else.
    """
    name = fields.text("dtype")
    if name not in DTYPES:
        raise fields.fail("dtype", f"one of {', '.join(DTYPES)}", name)
    return name


def _cache(fields: Fields) -> CacheSpec:
    dims: list[Dim] = []
    for axis, dim in enumerate(fields.take("shape", list, "a list")):
        if axis == 0 and dim == "batch":
            dims.append("batch")
        elif axis == 1 and isinstance(dim, dict):
            rows = Fields(dim, f"{fields.where}: shape[1]")
            dims.append(Rows(rows.count("rows", 1)))
            rows.done()
        elif axis > 0 and isinstance(dim, int) and not isinstance(dim, bool) and dim > 0:
            dims.append(dim)
        else:
            raise fields.fail("shape", '"batch", then {"rows": ratio} or a size, then sizes', dim)
    if not dims:
        raise fields.fail("shape", 'a list that begins with "batch"', dims)
    cache = CacheSpec(fields.text("name"), read_dtype(fields), tuple(dims))
    fields.done()
    return cache
