"""What ``v4c run`` does between its options and its output: prompt or saved session in, tokens out, session saved.

Nothing heavy is imported here: the command line imports this module for its help.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from v4c.errors import InputError

if TYPE_CHECKING:
    from v4c.runtime.generation import Counts, Options, Token
    from v4c.runtime.model import Model
    from v4c.runtime.session import Session


class Continuation:
    """One prompt, perhaps behind what a saved session has read.

    Args:
        model: the model.
        prompt: text, token ids, or None for what the session left to be read.
        options: how to generate.
        max_context: capacity, None for what is needed.
        restored: a file that `Session.save` wrote, or None.
        keep: whether `save` will be called.

    Attributes:
        prompt_tokens: tokens to be read before the first new one.

    Raises:
        v4c.Error: the session cannot be restored, or an argument is out of range.
    """

    def __init__(
        self, model: Model, prompt: Any, options: Options, max_context: int | None, restored: Path | None, keep: bool
    ) -> None:
        self._model, self._options = model, options
        self._session: Session | None = None
        before, pending = 0, np.empty(0, dtype=np.int64)
        if restored is not None:
            before, pending = self._standing(restored)
        ids = self._ids(prompt, before + len(pending) == 0)
        self._prompt = np.concatenate([pending, ids])
        if not len(self._prompt):
            raise InputError(f"{restored}: expected a prompt besides, found a session without a token left to be read")
        self.prompt_tokens = len(self._prompt)
        if restored is not None or keep:
            # One more than generating needs: the last token, for whoever continues.
            context = before + len(self._prompt) + options.max_new_tokens if max_context is None else max_context
            context = min(context, model.max_context) if max_context is None else context
            if restored is None:
                self._session = model.new_session(1, context)
            else:
                self._session = model.restore_session(restored, context)
            max_context = None
        self._generation = model.stream([self._prompt], options, max_context=max_context, session=self._session)
        self._made = 0

    @property
    def has_text(self) -> bool:
        """Whether tokens come with text."""
        return self._model.manifest.tokenizer is not None

    @property
    def speculative(self) -> bool:
        """Whether guesses are made."""
        return self._options.speculative

    @property
    def counts(self) -> Counts:
        """Steps and guesses so far."""
        return self._generation.counts

    def tokens(self) -> Iterator[Token]:
        """The tokens as they come."""
        for token in self._generation:
            self._made += 1
            yield token

    def save(self, path: Path) -> None:
        """Save the session; the last token, of the prompt or chosen, is left to be read."""
        assert self._session is not None
        if not self._made and len(self._prompt) > 1:
            self._session.prefill(self._prompt[None, :-1])
        self._session.save(path, self._generation.pending)

    def _ids(self, prompt: Any, begins: bool) -> np.ndarray:
        if prompt is None:
            return np.empty(0, dtype=np.int64)
        if isinstance(prompt, str):
            ids = self._model.tokenizer.encode(prompt, add_special_tokens=begins)
            if not ids.size:
                raise InputError("--prompt: expected text of at least one token, found none")
            return ids
        from v4c.runtime.prompts import one_prompt

        return one_prompt(prompt, self._model.vocab_size)

    def _standing(self, restored: Path) -> tuple[int, np.ndarray]:
        """Position of a saved session, and the token it left to be read."""
        from v4c.runtime.saved_session import SessionFile

        with SessionFile(restored, self._model.manifest) as file:
            saved = file.saved
        if len(saved.positions) != 1:
            raise InputError(f"{restored}: expected a session of 1 row, found {len(saved.positions)}")
        pending = np.empty(0, dtype=np.int64) if saved.pending is None else saved.pending
        return int(saved.positions[0]), pending
