"""Checks on what a caller passes to a session, before anything changes: every error is one line and names the row."""

from __future__ import annotations

from typing import Any

import numpy as np

from v4c.errors import InputError


def integer_array(value: Any, name: str) -> np.ndarray:
    """``value`` as a NumPy array of integers; arrays and anything with ``__dlpack__`` on the CPU are not copied.

    Raises:
        InputError: it is no array, lies on another device, or does not hold integers.
    """
    try:
        if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
            array = np.from_dlpack(value)
        else:
            array = np.asarray(value)
    except (BufferError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{name}: expected an array of integers in CPU memory, found {message}") from None
    if array.dtype.kind not in "iu":
        raise InputError(f"{name}: expected integers, found {array.dtype}")
    return array


def checked_lengths(value: Any, batch: int, longest: int) -> np.ndarray:
    """Live tokens per row as int64 [B]; None means ``longest`` for every row.

    Raises:
        InputError: wrong type or shape, or a length outside 0..longest.
    """
    if value is None:
        return np.full(batch, longest, dtype=np.int64)
    lengths = integer_array(value, "lengths")
    if lengths.shape != (batch,):
        raise InputError(f"lengths: expected shape [{batch}], found {list(lengths.shape)}")
    wrong = np.flatnonzero((lengths < 0) | (lengths > longest))
    if wrong.size:
        row = wrong[0]
        raise InputError(f"lengths[{row}]: expected 0 to {longest}, found {lengths[row]}")
    return lengths.astype(np.int64)


def checked_tokens(value: Any, batch: int, rank: int) -> np.ndarray:
    """Token ids as integers of any width, [B] or [B, S]; their values are checked by `live_tokens`.

    Raises:
        InputError: wrong type, rank or batch, or no token at all.
    """
    tokens = integer_array(value, "token_ids")
    expected = f"[{batch}]" if rank == 1 else f"[{batch}, tokens]"
    if tokens.ndim != rank or tokens.shape[0] != batch or 0 in tokens.shape:
        raise InputError(f"token_ids: expected shape {expected}, found {list(tokens.shape)}")
    return tokens


def live_tokens(tokens: np.ndarray, lengths: np.ndarray, vocab_size: int) -> np.ndarray:
    """``tokens`` [B, S] as int64 with 0 in place of padding, whatever stood there.

    Raises:
        InputError: a live token is outside the vocabulary.
    """
    live = np.arange(tokens.shape[1]) < lengths[:, None]
    wrong = np.argwhere(live & ((tokens < 0) | (tokens >= vocab_size)))
    if wrong.size:
        row, column = wrong[0]
        raise InputError(f"token_ids[{row}, {column}]: expected 0 to {vocab_size - 1}, found {tokens[row, column]}")
    return np.where(live, tokens, 0).astype(np.int64)


def check_capacity(positions: np.ndarray, lengths: np.ndarray, max_context: int) -> None:
    """Refuse tokens that would pass the capacity of the caches.

    Raises:
        InputError: naming the first row, its position and the capacity.
    """
    wrong = np.flatnonzero(positions + lengths > max_context)
    if wrong.size:
        row = wrong[0]
        raise InputError(
            f"row {row}: expected at most {max_context} tokens in this session (max_context), "
            f"found position {positions[row]} and {lengths[row]} more"
        )


def checked_count(value: Any, name: str, minimum: int, maximum: int | None = None) -> int:
    """An integer argument within its bounds.

    Raises:
        InputError: it is no integer, or outside ``minimum``..``maximum``.
    """
    bounds = f"an integer of at least {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise InputError(f"{name}: expected {bounds}, found {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        raise InputError(f"{name}: expected {bounds}, found {value}")
    return int(value)


def checked_rows(value: Any, batch: int) -> np.ndarray:
    """Row numbers of a batch, as int64.

    Raises:
        InputError: they are no integers, or outside the batch.
    """
    rows = np.atleast_1d(integer_array(value, "rows")) if np.size(value) else np.empty(0, dtype=np.int64)
    wrong = np.flatnonzero((rows < 0) | (rows >= batch))
    if rows.ndim != 1 or wrong.size:
        raise InputError(f"rows: expected row numbers below {batch}, found {rows.tolist()}")
    return rows.astype(np.int64)
