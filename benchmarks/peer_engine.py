"""What every peer must be able to do: read tokens, one or many, into a state of its own, and say what comes next."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

CHUNK = 512
"""Most tokens that are read at once, in every peer."""


class State(ABC):
    """A sequence that is being read, with its caches."""

    @abstractmethod
    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Read int64 ``[S]`` tokens, at most `CHUNK`, and return the logits behind the last, float32 ``[V]``.

        The result may be a view that the next call changes.
        """

    @abstractmethod
    def restart(self) -> None:
        """Back to position 0."""

    def mark(self) -> bool:
        """Remember this state for `rewind`; False where the peer cannot."""
        return False

    def rewind(self) -> None:
        """Back to where `mark` was called, as often as wanted."""
        raise NotImplementedError

    def pretend(self, position: int) -> bool:
        """Stand at `position` without having read that far, to time a step there; False where the peer cannot."""
        return False

    def close(self) -> None:  # noqa: B027 - most peers leave that to Python
        """Free the caches."""


class Engine(ABC):
    """A loaded model.

    Attributes:
        vocab_size: V.
        version: of the peer, as figures are quoted with.
    """

    vocab_size: int
    version: str

    @abstractmethod
    def begin(self, capacity: int) -> State:
        """A new state with room for `capacity` tokens."""
