"""Loading an artifact, and generating from it: what `v4c.load` returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from v4c.errors import InputError
from v4c.runtime.artifact import Artifact
from v4c.runtime.inputs import checked_count, integer_array
from v4c.runtime.library import Program, start_runtime
from v4c.runtime.manifest import Manifest, Target
from v4c.runtime.sampling import Sampler
from v4c.runtime.session import Session
from v4c.runtime.text import Tokenizer
from v4c.runtime.weight_memory import WeightMemory, parse_bytes, resident_bytes


def load(
    path: str | os.PathLike[str], *, threads: int | None = None, verify: str = "all",
    weights_memory: int | str | None = None,
) -> Model:  # fmt: skip
    """Load an artifact.

    Args:
        path: the folder that `v4c.compile` wrote.
        threads: threads per kernel, the same for every model of a process; None takes ``V4C_NUM_THREADS``, else
            ``TVM_NUM_THREADS``, else every CPU this process may use.
        verify: ``"all"`` hashes every file first; ``"code"`` the library alone, for artifacts too large to read twice.
        weights_memory: bytes that weights may occupy, as a number or such as ``"4GiB"``; routed experts and rows of
            tables then stay on disk but for those used last. None leaves it to the operating system.

    Raises:
        ArtifactError: the artifact is incomplete, altered, of another format, or for another machine.
        UnsupportedError: it was compiled for a target this runtime cannot drive.
        InputError: ``verify`` is unknown, ``threads`` is not what the process already runs with, or ``weights_memory``
            is no size, or too small.
    """
    bound = None if weights_memory is None else parse_bytes(weights_memory, "weights_memory")
    artifact = Artifact(path, verify)
    artifact.check_machine()
    running = start_runtime(threads)
    return Model(artifact, Program(artifact.library), running, bound)


class Model:
    """A loaded artifact: code and weights, shared by its sessions. Made by `load`.

    Attributes:
        manifest: everything the artifact says about itself.
        threads: threads per kernel.
    """

    def __init__(self, artifact: Artifact, program: Program, threads: int, weights_memory: int | None = None) -> None:
        self.manifest: Manifest = artifact.manifest
        self.threads = threads
        self._artifact = artifact
        self._program = program
        self._weights = artifact.map_weights()
        self._memory = None if weights_memory is None else artifact.bound_weights(weights_memory)

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration in Hugging Face layout."""
        return self.manifest.config

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.manifest.vocab_size

    @property
    def max_context(self) -> int:
        """Largest context of a session, in tokens."""
        return self.manifest.max_context

    @property
    def target(self) -> Target:
        """What it was compiled for."""
        return self.manifest.target

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generation."""
        return self.manifest.eos_token_ids

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            InputError: the artifact has none, or the package `tokenizers` is not installed.
        """
        if self._artifact.tokenizer is None:
            raise InputError(f"{self._artifact.path}: expected a tokenizer, found none: pass token ids")
        return Tokenizer(self._artifact.tokenizer)

    @property
    def weight_memory(self) -> WeightMemory | None:
        """The bound on the memory of weights and what it has cost; None without one."""
        return self._memory

    @property
    def resident_weight_bytes(self) -> int:
        """Bytes of the mapped weights that are in this process's memory now."""
        return resident_bytes(self._artifact.weight_files)

    def library_function(self, name: str) -> Callable[..., Any] | None:
        """A compiled function that is no entry point, None where the library has none of that name."""
        return self._program.function(name)

    def new_session(self, batch: int = 1, max_context: int | None = None) -> Session:
        """A session of ``batch`` rows of up to ``max_context`` tokens each (None: the model's largest).

        Its caches take memory as they fill, not at once.

        Raises:
            InputError: an argument is out of range, or the caches cannot be allocated.
        """
        batch = checked_count(batch, "batch", 1)
        if max_context is None:
            max_context = self.max_context
        max_context = checked_count(max_context, "max_context", 1, self.max_context)
        return Session(self._program, self.manifest, self._weights, batch, max_context, self._memory)

    def generate(
        self,
        token_ids: Any,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        max_context: int | None = None,
        eos: bool = True,
    ) -> Iterator[int]:
        """Continue one sequence; arguments are checked at once, tokens computed as they are asked for.

        Args:
            token_ids: the prompt, integers [S] or [1, S], at least one.
            max_new_tokens: most tokens to yield.
            temperature: see `Sampler`, as for ``top_p`` and ``seed``.
            top_p: see `Sampler`.
            seed: see `Sampler`.
            max_context: capacity of the session; None takes what is needed.
            eos: stop after a token of `eos_token_ids`, which is the last one yielded.

        Raises:
            InputError: an argument is out of range, or prompt and new tokens exceed the capacity.
        """
        sampler = Sampler(temperature, top_p, seed)
        prompt = integer_array(token_ids, "token_ids")
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        if prompt.ndim != 1 or prompt.size == 0:
            raise InputError(f"token_ids: expected shape [tokens] or [1, tokens], found {list(prompt.shape)}")
        wrong = np.flatnonzero((prompt < 0) | (prompt >= self.vocab_size))
        if wrong.size:
            raise InputError(f"token_ids[{wrong[0]}]: expected 0 to {self.vocab_size - 1}, found {prompt[wrong[0]]}")
        max_new_tokens = checked_count(max_new_tokens, "max_new_tokens", 0)
        needed = prompt.size + max(max_new_tokens - 1, 0)  # the last token is yielded, not read
        capacity = self.max_context if max_context is None else max_context
        capacity = checked_count(capacity, "max_context", 1, self.max_context)
        if needed > capacity:
            raise InputError(
                f"token_ids: expected at most {capacity} tokens (max_context), found {prompt.size} and "
                f"{max_new_tokens} new ones"
            )
        stop = frozenset(self.eos_token_ids) if eos else frozenset()
        session_context = needed if max_context is None else capacity
        return self._generate(prompt, max_new_tokens, sampler, session_context, stop)

    def _generate(
        self, prompt: np.ndarray, max_new_tokens: int, sampler: Sampler, max_context: int, stop: frozenset[int]
    ) -> Iterator[int]:
        if max_new_tokens == 0:
            return
        with self.new_session(max_context=max_context) as session:
            logits = session.prefill(prompt[None])
            for left in range(max_new_tokens - 1, -1, -1):
                token = int(sampler(logits)[0])
                yield token
                if token in stop or left == 0:
                    return
                logits = session.decode([token])
