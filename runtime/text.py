"""Text in and out: the checkpoint's ``tokenizer.json``, and text that appears while tokens arrive.

The library `tokenizers` is imported only here and only when text is wanted; models run on token ids alone without it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from v4c.errors import ArtifactError, InputError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The tokenizer of a ``tokenizer.json`` file.

    Raises:
        InputError: the library `tokenizers` is not installed.
        ArtifactError: the file is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import tokenizers
        except ImportError:
            raise InputError("text: the package tokenizers is not installed: install it, or pass token ids") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises bare exceptions
            message = " ".join(str(error).split())
            raise ArtifactError(f"{os.fspath(path)}: expected a tokenizer, found {message}") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> np.ndarray:
        """Token ids of ``text``, int64 [S]."""
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return np.array(ids, dtype=np.int64)

    def decode(self, token_ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; bytes that are no UTF-8 appear as U+FFFD."""
        return self._tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """Turns tokens into text as they come, never emitting half a character.

    Args:
        tokenizer: its tokenizer.
        skip_special_tokens: leave control tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._tokens: list[int] = []
        self._context = 0  # decoding starts here: some tokens read differently at the start of a text
        self._emitted = 0  # tokens whose text has been returned

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        self._tokens.append(int(token))
        text = self._pending()
        if text.endswith(_REPLACEMENT):  # the next token may bring the missing bytes
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """What is left at the end of the tokens; unfinished characters appear as U+FFFD."""
        text = self._pending()
        self._advance()
        return text

    def _pending(self) -> str:
        known = self._decode(self._tokens[self._context : self._emitted])
        return self._decode(self._tokens[self._context :])[len(known) :]

    def _advance(self) -> None:
        self._context = self._emitted
        self._emitted = len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
