"""A session: one batch of sequences being read and continued, with caches of its own.

Positions are data, so one call serves rows at different positions; padding and idle rows touch no state. A long prompt
is read in chunks, which bounds scratch memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from v4c.errors import ArtifactError, Error, InputError
from v4c.runtime.inputs import (
    check_capacity,
    checked_count,
    checked_lengths,
    checked_rows,
    checked_tokens,
    live_tokens,
)
from v4c.runtime.library import Program, one_line
from v4c.runtime.manifest import DECODE_ONE, DRAFT, PREFILL_STREAMS, VERIFY, Manifest
from v4c.runtime.saved_session import SavedSession, SessionFile, write_session
from v4c.runtime.tensors import aligned_zeros
from v4c.runtime.weight_memory import WeightMemory

_INT64 = np.dtype(np.int64)


@dataclass(frozen=True)
class Mark:
    """A point of a session that `Session.rewind` goes back to: positions [B, 1] of the tokens that may be taken back,
    and what the rings held in their slots, as the caches keep it."""

    positions: np.ndarray
    rows: Any


class Session:
    """Made by `Model.new_session`; several may run at once in different threads, sharing the weights.

    Calls on one session exclude each other. Token ids and lengths are NumPy arrays, lists, or anything with
    ``__dlpack__`` in CPU memory, of any integer type. Every method raises `InputError`, before anything has changed,
    for arguments that do not fit or when the session is closed.

    Attributes:
        batch: number of rows B.
        max_context: tokens a row can hold.
        pending: of a restored session, the tokens [B] that were given to `save` to be read next, or None.
    """

    def __init__(
        self, program: Program, manifest: Manifest, weights: Sequence[Any], batch: int, max_context: int,
        memory: WeightMemory | None = None,
    ) -> None:  # fmt: skip
        if memory is not None:
            memory.check_batch(batch)
        self._memory = memory
        self.batch = batch
        self.max_context = max_context
        self.pending: np.ndarray | None = None
        self._program = program
        self._manifest = manifest
        self._weights = weights
        self._device = program.device
        self._caches = self._device.caches(manifest.all_caches, batch, max_context)
        self._machine = program.new_machine()
        if memory is not None:
            self._machine.observe(memory.observe)
        self._functions: dict[str, Callable[..., Any]] = {}
        self._positions = aligned_zeros((batch,), _INT64)
        self._lengths = aligned_zeros((batch,), _INT64)
        # The compiled functions read inputs at the same places in every step; only their content changes.
        self._vectors = (self._device.mirror(self._positions, "int64"), self._device.mirror(self._lengths, "int64"))
        self._tokens: dict[int, tuple[np.ndarray, Any]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._observed = False
        self._interrupted = False

    @property
    def position(self) -> np.ndarray:
        """Tokens each row has read: int64 [B], a copy."""
        return self._positions.copy()

    def prefill(self, token_ids: Any, lengths: Any = None, all_logits: bool = False, chunk: int = 512) -> np.ndarray:
        """Read tokens, continuing where each row stands.

        Args:
            token_ids: [B, S], padded on the right with anything where lengths differ.
            lengths: [B], live tokens per row, 0 to S; None means S.
            all_logits: return the logits of every position.
            chunk: most tokens per row read at once.

        Returns:
            float32 [B, vocab], the logits of each row's last live token, NaN for a row of length 0; with
            ``all_logits``, [B, S, vocab], NaN at padding.
        """
        with self._lock:
            self._check_usable()
            chunk = checked_count(chunk, "chunk", 1)
            tokens = checked_tokens(token_ids, self.batch, rank=2)
            lengths = checked_lengths(lengths, self.batch, tokens.shape[1])
            tokens = live_tokens(tokens, lengths, self._manifest.vocab_size)
            check_capacity(self._positions, lengths, self.max_context)
            try:
                return self._prefill(tokens, lengths, all_logits, chunk)
            finally:
                with self._device.exclusive():
                    self._program.release_scratch()

    def decode(self, token_ids: Any, lengths: Any = None) -> np.ndarray:
        """Read one token per row.

        Args:
            token_ids: [B].
            lengths: [B] of 0 or 1; a row with 0 stays as it is. None means 1.

        Returns:
            float32 [B, vocab]; NaN for a row of length 0.
        """
        with self._lock:
            self._check_usable()
            tokens = checked_tokens(token_ids, self.batch, rank=1)[:, None]
            lengths = checked_lengths(lengths, self.batch, 1)
            tokens = live_tokens(tokens, lengths, self._manifest.vocab_size)
            check_capacity(self._positions, lengths, self.max_context)
            logits = self._run(self._decode_entry, tokens, lengths)
            logits[lengths == 0] = np.nan
            return logits

    def read_streams(
        self, token_ids: np.ndarray, lengths: np.ndarray, all_logits: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read one chunk, as `prefill` does, and return the residual streams as well; for `speculation`.

        Args:
            token_ids: int64 [B, S], padded on the right.
            lengths: int64 [B], live tokens per row.
            all_logits: logits of every position, not of each row's last live one.

        Returns:
            float32 logits [B, V] ([B, S, V]) and streams [B, S, M, D] before the head; what belongs to padding means
            nothing.
        """
        with self._lock:
            self._check_usable()
            tokens = live_tokens(token_ids, lengths, self._manifest.vocab_size)
            check_capacity(self._positions, lengths, self.max_context)
            try:
                logits, streams = self._call(VERIFY if all_logits else PREFILL_STREAMS, tokens, lengths, 2)
                return logits, streams
            finally:
                if not all_logits:  # a prompt, of any length
                    with self._device.exclusive():
                        self._program.release_scratch()

    def draft(
        self, token_ids: np.ndarray, positions: np.ndarray, lengths: np.ndarray, streams: np.ndarray
    ) -> np.ndarray:
        """Logits [B, V] of the multi-token-prediction layer: of the token after each row's last live one.

        Args:
            token_ids: int64 [B, S], the tokens after those that ``streams`` belong to.
            positions: int64 [B], of the first of ``streams``.
            lengths: int64 [B].
            streams: float32 [B, S, M, D].
        """
        with self._lock:
            self._check_usable()
            manifest = self._manifest
            assert manifest.mtp is not None
            if DRAFT not in self._functions:
                by_name = dict(zip((w.name for w in manifest.weights), self._weights, strict=True))
                weights = [by_name[name] for name in manifest.mtp.weights]
                caches = self._caches.tensors[len(manifest.caches) :]
                self._functions[DRAFT] = self._machine.bind(DRAFT, [*caches, *weights])
            tokens = live_tokens(token_ids, lengths, manifest.vocab_size)
            # The layer's state may only make guesses better or worse, so a call that fails leaves the session usable.
            with self._device.exclusive():
                tensors = [self._given(array, "int64") for array in (tokens, positions, lengths)]
                try:
                    outputs = self._functions[DRAFT](*tensors, self._given(streams, "float32"))
                    return self._device.fetch(outputs[0])
                except Exception as error:
                    raise Error(f"{DRAFT}: the compiled function failed: {one_line(error)}") from error

    def mark(self) -> Mark:
        """What `rewind` needs to take back the second of the next two tokens that are read."""
        with self._lock:
            self._check_usable()
            positions = self._positions[:, None] + 1
            with self._device.exclusive():
                return Mark(positions, self._caches.ring_rows(positions))

    def rewind(self, mark: Mark, rows: np.ndarray) -> None:
        """Take back the second of the two tokens that ``rows`` (bool [B]) have read since ``mark`` was made.

        The state is then, bit for bit, that of rows which have read the first one only. A ring is as it was but for
        the slots of the tokens read; that of the second is put back. Rows that grow with the context are written when
        their window is complete, and read after that: what the second token wrote is written again before it is read.
        """
        with self._lock:
            self._check_usable()
            with self._device.exclusive():
                self._caches.restore_ring_rows(mark.positions, mark.rows, rows[:, None])
            self._positions[rows] -= 1

    def reset(self, rows: Any = None) -> None:
        """Put rows back to position 0, all of them when ``rows`` is None; their memory is kept."""
        with self._lock:
            if self._closed:
                raise InputError("session: expected an open session, found a closed one")
            if rows is None:
                self._positions[:] = 0
                self._interrupted = False
            else:
                self._check_usable()
                self._positions[checked_rows(rows, self.batch)] = 0

    def pretend(self, position: int) -> None:
        """Put every row at ``position`` without reading tokens, to measure a step there.

        Rings stay as they are. Of caches that grow with the context, rows that were not written repeat those that were,
        so that they take memory and hold values of the usual size.
        """
        with self._lock:
            self._check_usable()
            position = checked_count(position, "position", 0, self.max_context)
            with self._device.exclusive():
                self._caches.repeat(self._positions, position)
            self._positions[:] = position

    def observe(self, callback: Callable[..., Any]) -> None:
        """Report every call inside the compiled functions to ``callback``, from now on; see `Machine.observe`."""
        with self._lock:
            self._check_usable()
            self._observed = True
            self._functions.clear()
            memory = self._memory

            def both(*event: Any) -> None:
                callback(*event)
                if memory is not None:
                    memory.observe(*event)

            self._machine.observe(both if memory is not None else callback)

    def fetch(self, tensor: Any) -> np.ndarray:
        """A tensor that an observed function was given, as an array."""
        return self._device.fetch(tensor)

    def fork(self) -> Session:
        """An independent session in the same state; what is copied is what has been read, not the whole capacity."""
        with self._lock:
            self._check_usable()
            forked = Session(self._program, self._manifest, self._weights, self.batch, self.max_context, self._memory)
            with self._device.exclusive():
                forked._caches.copy_live(self._caches, self._positions)
            forked._positions[:] = self._positions
            return forked

    def save(self, path: str | os.PathLike[str], pending: Any = None) -> None:
        """Write the session to a file, from which `Model.restore_session` makes one that continues bit for bit.

        What is written is what has been read, not the capacity. A file that is there is replaced, once it is complete.

        Args:
            path: the file, in safetensors format.
            pending: [B], a token for each row that was chosen but not read, to be found as `pending` when restored.

        Raises:
            OutputError: the file cannot be written.
        """
        with self._lock:
            self._check_usable()
            if pending is not None:
                tokens = checked_tokens(pending, self.batch, rank=1)[:, None]
                pending = live_tokens(tokens, np.ones(self.batch, dtype=np.int64), self._manifest.vocab_size)[:, 0]
            saved = SavedSession(self.max_context, self._positions.copy(), pending)
            write_session(Path(path), self._manifest, saved, self._caches.to_save(self._positions))

    def fill(self, file: SessionFile) -> None:
        """Take over the state of a saved session with as many rows; for `Model.restore_session`."""
        file.read_into(self._caches.to_fill(file.saved.positions))
        self._positions[:] = file.saved.positions
        self.pending = file.saved.pending

    def close(self) -> None:
        """Free the caches; closing twice is allowed."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._functions.clear()
                del self._machine, self._caches

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prefill(self, tokens: np.ndarray, lengths: np.ndarray, all_logits: bool, chunk: int) -> np.ndarray:
        shape = tokens.shape if all_logits else (self.batch,)
        result = np.full((*shape, self._manifest.vocab_size), np.nan, dtype=np.float32)
        if self._memory is not None:  # no more tokens at once than have room for their experts
            chunk = min(chunk, self._memory.tokens_per_call // self.batch)
        for start in range(0, int(lengths.max()), chunk):
            live = np.clip(lengths - start, 0, chunk)
            width = int(live.max())
            piece = tokens[:, start : start + width]
            if all_logits:
                logits = self._run("prefill_all", piece, live)
                mask = np.arange(width) < live[:, None]
                result[:, start : start + width][mask] = logits[mask]
            else:
                logits = self._run(self._decode_entry if width == 1 else "prefill", piece, live)
                result[live > 0] = logits[live > 0]
        return result

    @property
    def _decode_entry(self) -> str:
        """The entry point of a step of one token per row."""
        return DECODE_ONE if self.batch == 1 and DECODE_ONE in self._manifest.entry_points else "decode"

    def _run(self, entry: str, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """One call of a compiled function on checked arguments; its logits."""
        return self._call(entry, tokens, lengths, 1)[0]

    def _call(self, entry: str, tokens: np.ndarray, lengths: np.ndarray, results: int) -> list[np.ndarray]:
        """One call of a compiled function on checked arguments; its first ``results`` outputs."""
        with self._device.exclusive():
            return self._call_alone(entry, tokens, lengths, results)

    def _call_alone(self, entry: str, tokens: np.ndarray, lengths: np.ndarray, results: int) -> list[np.ndarray]:
        self._lengths[:] = lengths
        input_ids = self._feed(tokens)
        first = entry not in self._functions
        if first:
            self._functions[entry] = self._bound(entry)
        # Until the positions match the caches again, an exception (Ctrl-C included) leaves a state nobody can use.
        self._interrupted = True
        try:
            with self._memory.step(tokens) if self._memory is not None else nullcontext():
                outputs = self._functions[entry](input_ids, *self._vectors)
            fetched = [self._device.fetch(outputs[index]) for index in range(results)]
        except Exception as error:
            raise Error(f"{entry}: the compiled function failed: {one_line(error)}") from error
        if first:
            self._check_in_place(entry, outputs)
        self._positions += lengths
        self._interrupted = False
        return fetched

    def _bound(self, entry: str) -> Callable[..., Any]:
        """An entry point with caches and weights; a step as the device repeats it, unless its calls are observed."""
        manifest = self._manifest
        caches = self._caches.tensors[: len(manifest.caches)]
        weights = self._weights[: manifest.main_weights]
        bound = self._machine.bind(manifest.entry_points.get(entry, entry), [*caches, *weights])
        if entry != self._decode_entry or self._observed:
            return bound
        return self._device.step(bound, lambda: self._program.releases)

    def _feed(self, tokens: np.ndarray) -> Any:
        """The input tensor with ``tokens`` [B, S], and the vectors up to date; those of steps are kept."""
        width = tokens.shape[1]
        held = self._tokens.get(width)
        if held is None:
            input_ids = aligned_zeros(tokens.shape, _INT64)
            held = (input_ids, self._device.mirror(input_ids, "int64"))
            if width <= 2:
                self._tokens[width] = held
        held[0][:] = tokens
        self._device.refresh(held[1], held[0])
        for tensor, array in zip(self._vectors, (self._positions, self._lengths), strict=True):
            self._device.refresh(tensor, array)
        return held[1]

    def _given(self, array: np.ndarray, dtype: str) -> Any:
        """A tensor with what is in ``array``."""
        copy = aligned_zeros(array.shape, np.dtype(dtype))
        copy[...] = array
        tensor = self._device.mirror(copy, dtype)
        self._device.refresh(tensor, copy)
        return tensor

    def _check_in_place(self, entry: str, outputs: Any) -> None:
        """Refuse a library whose caches are copies: its state would be lost after every call."""
        results = len(outputs) - len(self._manifest.caches)
        for index, (spec, tensor) in enumerate(zip(self._manifest.caches, self._caches.tensors, strict=False), results):
            if outputs[index].data_ptr() != tensor.data_ptr():
                raise ArtifactError(f"{entry}: cache {spec.name}: expected an update in place, found a copy")

    def _check_usable(self) -> None:
        if self._closed:
            raise InputError("session: expected an open session, found a closed one")
        if self._interrupted:
            raise InputError("session: expected a whole state, found one whose last call was interrupted: reset() it")
