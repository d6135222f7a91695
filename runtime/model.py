"""Loading an artifact, and generating from it: what `v4c.load` returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import InputError
from v4c.runtime.artifact import Artifact
from v4c.runtime.cuda import first_gpu
from v4c.runtime.devices import Device, Host
from v4c.runtime.generation import Completion, Counts, Generation, Options, Processor, Row, Token, plain
from v4c.runtime.huge_pages import check_huge_pages
from v4c.runtime.inputs import checked_count
from v4c.runtime.library import Program, start_runtime
from v4c.runtime.manifest import Manifest, Target
from v4c.runtime.prompts import one_prompt, read_prompts
from v4c.runtime.saved_session import SessionFile
from v4c.runtime.session import Session
from v4c.runtime.speculation import check_speculation, speculative
from v4c.runtime.stopping import checked_stop
from v4c.runtime.text import Tokenizer
from v4c.runtime.weight_memory import WeightMemory, parse_bytes, resident_bytes


def load(
    path: str | os.PathLike[str], *, threads: int | None = None, verify: str = "all",
    weights_memory: int | str | None = None, huge_pages: bool = False,
) -> Model:  # fmt: skip
    """Load an artifact.

    Args:
        path: the folder that `v4c.compile` wrote.
        threads: threads per kernel, the same for every model of a process; None takes ``V4C_NUM_THREADS``, else
            ``TVM_NUM_THREADS``, else every CPU this process may use.
        verify: ``"all"`` hashes every file first; ``"code"`` the library alone, for artifacts too large to read twice.
        weights_memory: bytes that weights may occupy, as a number or such as ``"4GiB"``; routed experts and rows of
            tables then stay on disk but for those used last. None leaves it to the operating system.
        huge_pages: copy the weights into memory of this process in pages of 2 MiB instead of mapping them: decoding is
            faster, but loading reads every byte, the weights must fit, and processes do not share them.

    Raises:
        ArtifactError: the artifact is incomplete, altered, of another format, or for another machine.
        UnsupportedError: it was compiled for a target this runtime cannot drive, or for a GPU and something that needs
            is missing; or this kernel gives no huge pages on advice.
        InputError: ``verify`` is unknown, ``threads`` is not what the process already runs with, ``weights_memory`` is
            no size, or too small, or ``huge_pages`` come with it, for a GPU, or need more memory than is free; or the
            weights do not fit on the GPU, or its tables in host memory.
    """
    bound = None if weights_memory is None else parse_bytes(weights_memory, "weights_memory")
    if huge_pages and bound is not None:
        raise InputError(f"huge_pages: expected no weights_memory with them, found {bound} bytes")
    if huge_pages:
        check_huge_pages()
    artifact = Artifact(path, verify)
    artifact.check_machine()
    running = start_runtime(threads)
    if artifact.on_gpu and bound is not None:
        target = artifact.manifest.target.name
        raise InputError(f"weights_memory: expected none for target {target}, found {bound} bytes")
    if artifact.on_gpu and huge_pages:
        raise InputError(
            f"huge_pages: expected a model for the processor, found target {artifact.manifest.target.name}"
        )
    device = first_gpu() if artifact.on_gpu else Host()
    return Model(artifact, Program(artifact.library, device), running, bound, huge_pages)


class Model:
    """A loaded artifact: code and weights, shared by its sessions. Made by `load`.

    Attributes:
        manifest: everything the artifact says about itself.
        threads: threads per kernel.
    """

    def __init__(
        self, artifact: Artifact, program: Program, threads: int, weights_memory: int | None = None,
        huge_pages: bool = False,
    ) -> None:  # fmt: skip
        self.manifest: Manifest = artifact.manifest
        self.threads = threads
        self._artifact = artifact
        self._program = program
        self._huge_pages = huge_pages
        tensors = artifact.copy_weights() if huge_pages else artifact.map_weights()
        self._weights = program.device.weights(tensors, artifact.host_tables)
        self._memory = None if weights_memory is None else artifact.bound_weights(weights_memory)

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration in Hugging Face layout."""
        return self.manifest.config

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self._artifact.on_gpu

    @property
    def device(self) -> Device:
        """Where it runs."""
        return self._program.device

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
        """Bytes of the weights that are in this process's memory now: all, where they are in huge pages."""
        if self._huge_pages:
            return sum(file.stat().st_size for file in self._artifact.weight_files)
        return resident_bytes(self._artifact.weight_files)

    def library_function(self, name: str) -> Callable[..., Any] | None:
        """A compiled function that is no entry point, None where the library has none of that name."""
        return self._program.function(name)

    def new_session(self, batch: int = 1, max_context: int | None = None) -> Session:
        """A session of ``batch`` rows of up to ``max_context`` tokens each (None: the model's largest).

        Its caches take memory as they fill, not at once; on a GPU, at once.

        Raises:
            InputError: an argument is out of range, or the caches cannot be allocated.
        """
        batch = checked_count(batch, "batch", 1)
        if max_context is None:
            max_context = self.max_context
        max_context = checked_count(max_context, "max_context", 1, self.max_context)
        return Session(self._program, self.manifest, self._weights, batch, max_context, self._memory)

    def restore_session(self, path: str | os.PathLike[str], max_context: int | None = None) -> Session:
        """A session in the state of the one that `Session.save` wrote to ``path``.

        Args:
            path: the file.
            max_context: capacity in tokens, at least what the rows have read; None takes what the saved one had.

        Raises:
            ArtifactError: the file is missing, damaged, of another version, or of another model.
            InputError: ``max_context`` is out of range.
        """
        with SessionFile(Path(path), self.manifest) as file:
            context = file.saved.max_context
            if max_context is not None:
                least = max(1, int(file.saved.positions.max()))
                context = checked_count(max_context, "max_context", least, self.max_context)
            session = self.new_session(len(file.saved.positions), context)
            try:
                session.fill(file)
            except BaseException:
                session.close()
                raise
        return session

    def generate(
        self,
        token_ids: Any,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        max_context: int | None = None,
        eos: bool = True,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        processor: Processor | None = None,
        session: Session | None = None,
        speculative: bool = False,
    ) -> Iterator[int]:
        """Continue one sequence; arguments are checked at once, tokens computed as they are asked for.

        Args:
            token_ids: the prompt, integers [S] or [1, S], at least one.
            max_new_tokens: most tokens to yield.
            temperature: see `Sampler`, as for ``top_p``, ``seed``, ``top_k`` and ``min_p``.
            top_p: see `Sampler`.
            seed: see `Sampler`.
            max_context: capacity of the session; None takes what is needed.
            eos: stop after a token of `eos_token_ids`, which is the last one yielded.
            top_k: see `Sampler`.
            min_p: see `Sampler`.
            stop: end with the token that completes one of these strings; needs a tokenizer.
            processor: changes the logits before each choice; see `Processor`.
            session: a session of one row to continue; None makes one and closes it at the end.
            speculative: see `Options`.

        Raises:
            InputError: an argument is out of range, or prompt and new tokens exceed the capacity.
        """
        options = Options(
            max_new_tokens, temperature, top_p, top_k, min_p, seed, eos, stop, (), None, processor, speculative
        )
        prompt = one_prompt(token_ids, self.vocab_size)
        return (token.id for token in self._stream([prompt], options, max_context, session, "token_ids"))

    def stream(
        self,
        prompts: Any,
        options: Options | None = None,
        *,
        max_context: int | None = None,
        session: Session | None = None,
    ) -> Generation:
        """Continue a batch of prompts of any lengths; each step yields a `Token` for every row that goes on.

        Arguments are checked at once, tokens computed as they are asked for.

        Args:
            prompts: a text or token ids [S]; or a list of texts, a list of id lists, or ids [B, S]. Texts need a
                tokenizer.
            options: how to generate; None takes the defaults.
            max_context: capacity of the session; None takes what is needed.
            session: a session of as many rows to continue; None makes one and closes it at the end. Texts that continue
                a row get no special tokens in front.

        Raises:
            InputError: an argument is out of range, a prompt is empty, or prompt and new tokens exceed the capacity.
        """
        fresh = None if session is None else session.position == 0
        read = read_prompts(prompts, self.vocab_size, lambda: self.tokenizer, fresh)
        return self._stream(read, options or Options(), max_context, session, "prompts")

    def complete(
        self,
        prompts: Any,
        options: Options | None = None,
        *,
        max_context: int | None = None,
        session: Session | None = None,
    ) -> list[Completion]:
        """All that `stream` yields, gathered into one `Completion` per row."""
        return self.stream(prompts, options, max_context=max_context, session=session).completions()

    def _stream(
        self,
        prompts: list[np.ndarray],
        options: Options,
        max_context: int | None,
        session: Session | None,
        name: str,
    ) -> Generation:
        has_text = self._artifact.tokenizer is not None
        if checked_stop(options.stop) and not has_text:
            raise InputError(f"stop: expected an artifact with a tokenizer, found none in {self._artifact.path}")
        if session is not None and (max_context is not None or session.batch != len(prompts)):
            expected = f"a session of {len(prompts)} rows" if max_context is None else "no max_context beside a session"
            raise InputError(f"session: expected {expected}, found {session.batch} rows, max_context {max_context}")
        read = np.zeros(len(prompts), dtype=np.int64) if session is None else session.position
        capacity = session.max_context if session is not None else self.max_context
        if max_context is not None:
            capacity = checked_count(max_context, "max_context", 1, self.max_context)
        new = max(options.max_new_tokens - 1, 0)  # the last token is yielded, not read
        needed = [int(position) + len(prompt) + new for position, prompt in zip(read, prompts, strict=True)]
        if max(needed) > capacity:
            row = int(np.argmax(needed))
            before = f"{read[row]} read, " if read[row] else ""
            raise InputError(
                f"{name}: expected at most {capacity} tokens (max_context), found {before}{len(prompts[row])} and "
                f"{options.max_new_tokens} new ones"
            )
        if options.speculative:
            check_speculation(self.manifest)
        ends = frozenset(options.stop_token_ids) | frozenset(self.eos_token_ids if options.eos else ())
        tokenizer = self.tokenizer if has_text and (name == "prompts" or options.stop) else None
        rows = [Row(index, prompt, options, ends, tokenizer) for index, prompt in enumerate(prompts)]
        counts = Counts()
        context = max(needed) if max_context is None else capacity
        return Generation(self._tokens(prompts, rows, options, session, context, counts), rows, counts)

    def _tokens(
        self,
        prompts: list[np.ndarray],
        rows: list[Row],
        options: Options,
        session: Session | None,
        max_context: int,
        counts: Counts,
    ) -> Iterator[Token]:
        if options.max_new_tokens == 0:
            return
        generate = speculative if options.speculative else plain
        if session is not None:
            yield from generate(session, prompts, rows, counts)
            return
        with self.new_session(len(prompts), max_context) as own:
            yield from generate(own, prompts, rows, counts)
