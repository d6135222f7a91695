"""Prompts in any form - text, ids, several of either - as a list of id arrays, checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from v4c.errors import InputError
from v4c.runtime.inputs import integer_array
from v4c.runtime.text import Tokenizer


def one_prompt(token_ids: Any, vocab_size: int) -> np.ndarray:
    """One prompt of integers [S] or [1, S] as int64 [S].

    Raises:
        InputError: it has another shape, is empty, or holds ids outside the vocabulary.
    """
    prompt = integer_array(token_ids, "token_ids")
    if prompt.ndim == 2 and prompt.shape[0] == 1:
        prompt = prompt[0]
    if prompt.ndim != 1 or prompt.size == 0:
        raise InputError(f"token_ids: expected shape [tokens] or [1, tokens], found {list(prompt.shape)}")
    return _checked(prompt, "token_ids", vocab_size)


def read_prompts(
    prompts: Any, vocab_size: int, tokenizer: Callable[[], Tokenizer], fresh: np.ndarray | None = None
) -> list[np.ndarray]:
    """A text, ids [S], a list of either, or ids [B, S], as int64 arrays, one per row.

    Args:
        prompts: what was given.
        vocab_size: ids are below it.
        tokenizer: gives the tokenizer, when a text is met.
        fresh: [B], whether a row begins: its text then gets the tokenizer's special tokens. None: every row does.

    Raises:
        InputError: something else was given, a prompt is empty, or an id is outside the vocabulary.
    """
    if isinstance(prompts, str):
        items: list[Any] = [prompts]
    elif isinstance(prompts, list | tuple) and prompts and not isinstance(prompts[0], int | np.integer):
        items = list(prompts)
    else:
        array = integer_array(prompts, "prompts")
        items = list(array) if array.ndim == 2 else [array]
    if not items:
        raise InputError("prompts: expected at least one, found none")
    return [_row(item, index, vocab_size, tokenizer, fresh) for index, item in enumerate(items)]


def _row(
    item: Any, index: int, vocab_size: int, tokenizer: Callable[[], Tokenizer], fresh: np.ndarray | None
) -> np.ndarray:
    name = f"prompts[{index}]"
    if isinstance(item, str):
        begins = fresh is None or index >= len(fresh) or bool(fresh[index])
        ids = tokenizer().encode(item, add_special_tokens=begins)
        if ids.size == 0:
            raise InputError(f"{name}: expected text of at least one token, found {item[:40]!r}")
    else:
        ids = integer_array(item, name)
        if ids.ndim != 1 or ids.size == 0:
            raise InputError(f"{name}: expected token ids [tokens], found shape {list(ids.shape)}")
    return _checked(ids, name, vocab_size)


def _checked(ids: np.ndarray, name: str, vocab_size: int) -> np.ndarray:
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if wrong.size:
        raise InputError(f"{name}[{wrong[0]}]: expected 0 to {vocab_size - 1}, found {ids[wrong[0]]}")
    return ids.astype(np.int64)
