"""What a target gives the importer: for every op a kernel, named by its factory and sizes before it is built.

Kernels are compared before they are built, so whatever asks for the same factory with the same sizes - another layer
kind, the prompt and the decode function - shares one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from v4c.custom_ops import CustomOp, TensorSpec

from .layouts import Storage, WeightSpec


@dataclass(frozen=True)
class Kernel:
    """A kernel yet to be built.

    Attributes:
        factory: makes the PrimFunc: inputs, then the outputs that are not written in place.
        arguments: static sizes and settings, hashable.
    """

    factory: Callable[..., Any]
    arguments: tuple[Any, ...]

    def build(self) -> Any:
        """The PrimFunc; the last few hundred are kept, for parsing one takes up to a second."""
        return _built(self)


@functools.lru_cache(maxsize=512)
def _built(kernel: Kernel) -> Any:
    return kernel.factory(*kernel.arguments)


class Kernels(Protocol):
    """Which kernel stands for which op on a target, and how weights are packed for them."""

    def custom(self, op: CustomOp, inputs: Sequence[TensorSpec], attributes: Mapping[str, int | float]) -> Kernel:
        """Kernel of a custom op; weights among `inputs` have the shape they have in the graph."""

    def linear(self, sizes: tuple[int, ...], k: int, dtype: str, norm_eps: float | None) -> Kernel:
        """``x [rows, K]`` (with `norm_eps` also a norm's ``[K]``) and a packed weight to a ``[rows, N]`` per size."""

    def linear_unpacked(self, n: int, k: int, dtype: str) -> Kernel:
        """``x [rows, K]`` and a weight ``[N, K]`` as it is to ``[rows, N]``."""

    def grouped_linear(self, groups: int, n: int, k: int, dtype: str) -> Kernel:
        """``x [rows, G, K]`` and a packed ``[G, N, K]`` weight to ``[rows, G, N]``."""

    def rms_norm(self, width: int, eps: float, weighted: bool) -> Kernel:
        """``x [rows, D]`` (and ``weight [D]``) to ``[rows, D]``."""

    def packed(self, weight: WeightSpec) -> TensorSpec:
        """Shape and dtype a weight has in memory."""


@runtime_checkable
class FollowsStorage(Protocol):
    """Kernels of a target whose arithmetic depends on what weights are stored as, beyond the kernels that read them."""

    def storing(self, storage: Storage) -> Kernels:
        """The kernels for a model stored so; they share whatever account these keep."""


@runtime_checkable
class Adds(Protocol):
    """Kernels of a target that leaves no arithmetic on activations to TVM's own loops."""

    def add(self, width: int) -> Kernel:
        """Two ``[rows, D]`` to their sum."""
