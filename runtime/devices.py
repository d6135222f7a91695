"""Where compiled functions run: what sessions need of the processor's memory, or of a GPU's.

On the processor arrays are shared with compiled code. On a GPU (`cuda.py`) they have a tensor there, which is refreshed
before a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from v4c.runtime.caches import Caches
from v4c.runtime.host_memory import HostTable
from v4c.runtime.manifest import CacheSpec
from v4c.runtime.tensors import array_over, tensor_over

_CPU = 1  # DLPack's device type
_POOLED = 2  # keep scratch memory between calls, see Program.release_scratch

CPU_MACHINE = (_CPU, 0, _POOLED)
"""What a virtual machine is told of the processor."""


class SessionCaches(Protocol):
    """The state of one session."""

    @property
    def tensors(self) -> list[Any]:
        """TVM tensors in the manifest's order, at the same places as long as the session lives."""

    def to_save(self, positions: np.ndarray) -> Iterable[np.ndarray]:
        """The state of rows that have read ``positions`` [B] tokens, a cache after the other in the manifest's order.

        Each [B, n, ...] in the storage type of its dtype; of a cache that grows, n is at least what is written.
        """

    def to_fill(self, positions: np.ndarray) -> Iterable[np.ndarray]:
        """Arrays of the same kind to write such a state to, each before the next is asked for."""

    def ring_rows(self, positions: np.ndarray) -> Any:
        """As of `Caches`; sessions of models with an MTP layer ask for it."""

    def restore_ring_rows(self, positions: np.ndarray, saved: Any, wanted: np.ndarray) -> None:
        """As of `Caches`; sessions of models with an MTP layer ask for it."""

    def copy_live(self, source: Any, positions: np.ndarray) -> None:
        """Take over what ``source``, of another session, holds of rows that have read ``positions`` [B] tokens."""

    def repeat(self, positions: np.ndarray, position: int) -> None:
        """Fill caches that grow to ``position`` tokens with the rows written so far; ``positions`` [B] read."""


class Device(Protocol):
    """What a session asks of the device that its program runs on."""

    @property
    def machine(self) -> tuple[int, ...]:
        """Devices of a virtual machine: type, number and allocator of each."""

    def weights(self, tensors: Sequence[Any], tables: Sequence[HostTable | None]) -> list[Any]:
        """Weights that are mapped into memory, where kernels read them; ``tables`` are those that stay on the host."""

    def caches(self, specs: Sequence[CacheSpec], batch: int, max_context: int) -> SessionCaches:
        """Caches of a new session."""

    def mirror(self, array: np.ndarray, dtype: str) -> Any:
        """A tensor for kernels that stands for ``array``, once it is refreshed; its place does not change."""

    def refresh(self, tensor: Any, array: np.ndarray) -> None:
        """Bring a tensor that `mirror` made up to date."""

    def fetch(self, tensor: Any) -> np.ndarray:
        """A result of a compiled function, once it is computed, as a writable array."""

    def exclusive(self) -> AbstractContextManager[Any]:
        """Held while a session calls compiled functions or copies state."""

    def settle(self) -> None:
        """Wait for copies that TVM made by itself."""

    def step(self, function: Callable[..., Any], releases: Callable[[], int]) -> Callable[..., Any]:
        """The same function, made for being called with the same tensors over and over.

        ``releases`` counts how often scratch memory has been released, or taken for good.
        """


class Host:
    """The processor."""

    machine = CPU_MACHINE

    def weights(self, tensors: Sequence[Any], tables: Sequence[HostTable | None]) -> list[Any]:
        return list(tensors)

    def caches(self, specs: Sequence[CacheSpec], batch: int, max_context: int) -> Caches:
        return Caches(specs, batch, max_context)

    def mirror(self, array: np.ndarray, dtype: str) -> Any:
        return tensor_over(array, dtype)

    def refresh(self, tensor: Any, array: np.ndarray) -> None:
        """Nothing to do: the memory is shared."""

    def fetch(self, tensor: Any) -> np.ndarray:
        return array_over(tensor)

    def exclusive(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def settle(self) -> None:
        """Nothing to do: they are made when the call returns."""

    def step(self, function: Callable[..., Any], releases: Callable[[], int]) -> Callable[..., Any]:
        return function
