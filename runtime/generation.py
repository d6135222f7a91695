"""Continuing a batch of prompts token by token: what `Model.stream` and `Model.generate` iterate over.

A row that has finished idles: it is passed with length 0, so it is neither computed nor touched, while the others go
on. With a multi-token-prediction layer a step reads the chosen token and a guess of the next one (`speculation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from v4c.errors import InputError
from v4c.runtime.inputs import checked_count
from v4c.runtime.sampling import Sampler, log_probabilities, most_likely
from v4c.runtime.stopping import StopStrings, checked_stop
from v4c.runtime.text import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from v4c.runtime.session import Session

Processor = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A logits processor: ``processor(token_ids [S] int64, logits [V] float32) -> logits [V]`` of one row, before the token
is chosen. ``token_ids`` are the row's prompt and what was generated so far; the logits may be changed in place and
returned; -inf forbids a token."""


@dataclass(frozen=True)
class Options:
    """How to generate; every field has a default.

    Attributes:
        max_new_tokens: most tokens per row.
        temperature: see `Sampler`, as for ``top_p``, ``top_k`` and ``min_p``.
        seed: row r of a batch draws as a batch of one would with seed + r; None: another each time.
        eos: end a row after a token of `Model.eos_token_ids`, whose text is left out.
        stop: strings that end a row; they are left out of its text. Needs a tokenizer.
        stop_token_ids: further ids that end a row, as ``eos`` does.
        logprobs: None for none; else the log probability of each token, and that many of the likeliest beside it.
        processor: a logits processor, or None.
        speculative: guess a token ahead with the artifact's multi-token-prediction layer; the tokens stay the same.

    Raises:
        InputError: a field is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    eos: bool = True
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    processor: Processor | None = None
    speculative: bool = False

    def __post_init__(self) -> None:
        checked_count(self.max_new_tokens, "max_new_tokens", 0)
        checked_stop(self.stop)
        for token in self.stop_token_ids:
            checked_count(token, "stop_token_ids", 0)
        if self.logprobs is not None:
            checked_count(self.logprobs, "logprobs", 0)
        if self.processor is not None and not callable(self.processor):
            raise InputError(f"processor: expected a function of token ids and logits, found {self.processor!r}")
        self.sampler(0)

    def sampler(self, row: int) -> Sampler:
        """A new sampler for a row of a batch."""
        seed = self.seed if self.seed is None else checked_count(self.seed, "seed", 0) + row
        return Sampler(self.temperature, self.top_p, seed, self.top_k, self.min_p)


@dataclass(frozen=True)
class Token:
    """One token of one row, as it comes.

    Attributes:
        row: its row.
        id: its id.
        text: the text that became certain with it: empty while a character or a possible stop string is unfinished.
        logprob: natural logarithm of its probability in the model's distribution (temperature 1, before the processor
            and every filter), None unless asked for.
        top_logprobs: the likeliest tokens of that distribution, (id, logprob), the likeliest first.
        finish: why the row ends here: ``"eos"``, ``"stop"`` or ``"length"``; None while it goes on.
    """

    row: int
    id: int
    text: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish: str | None = None


@dataclass
class Completion:
    """All of a row: its ids, its text, and the log probabilities if they were asked for; see `Token`."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish: str | None = None

    def add(self, token: Token) -> None:
        """Append a token of the row."""
        self.token_ids.append(token.id)
        self.text += token.text
        if token.logprob is not None:
            self.logprobs.append(token.logprob)
            self.top_logprobs.append(token.top_logprobs)
        self.finish = token.finish


class Row:
    """One sequence: chooses its tokens, turns them into text, and knows when it ends.

    Args:
        index: its row in the batch.
        prompt: int64 [S].
        options: how to generate.
        ends: ids that end it.
        tokenizer: for its text; None gives none.
    """

    def __init__(
        self, index: int, prompt: np.ndarray, options: Options, ends: frozenset[int], tokenizer: Tokenizer | None
    ) -> None:
        self._index, self._options, self._ends = index, options, ends
        self._sampler = options.sampler(index)
        self._history = np.concatenate([prompt, np.empty(options.max_new_tokens, dtype=np.int64)])
        self._filled = len(prompt)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopStrings(options.stop)
        self.finished = options.max_new_tokens == 0

    @property
    def last(self) -> int:
        """The last token of the prompt, or chosen."""
        return int(self._history[self._filled - 1])

    @property
    def left(self) -> int:
        """Tokens that may still be chosen."""
        return len(self._history) - self._filled

    def choose(self, logits: np.ndarray) -> Token:
        """The next token, from the logits [V] after the last one."""
        log_probs = None if self._options.logprobs is None else log_probabilities(logits)
        if self._options.processor is not None:
            logits = self._processed(logits)
        token = int(self._sampler(logits[None])[0])
        self._history[self._filled] = token
        self._filled += 1
        ended = "eos" if token in self._ends else None
        text = self._text(token, ended is not None)
        if ended is None and self._stop.found is not None:
            ended = "stop"
        if ended is None and self._filled == len(self._history):
            ended = "length"
        self.finished = ended is not None
        if ended is not None and self._detokenizer is not None:
            text += self._stop.push(self._detokenizer.flush()) + self._stop.flush()
        if log_probs is None:
            return Token(self._index, token, text, finish=ended)
        likely = most_likely(log_probs, self._options.logprobs or 0)
        top = tuple((other, float(log_probs[other])) for other in likely)
        return Token(self._index, token, text, float(log_probs[token]), top, ended)

    def _processed(self, logits: np.ndarray) -> np.ndarray:
        assert self._options.processor is not None
        found = self._options.processor(self._history[: self._filled].copy(), logits.copy())
        if not isinstance(found, np.ndarray) or found.shape != logits.shape or found.dtype.kind != "f":
            raise InputError(f"processor: expected logits of shape {list(logits.shape)}, found {_kind(found)}")
        return found

    def _text(self, token: int, ended: bool) -> str:
        if self._detokenizer is None or ended:
            return ""
        return self._stop.push(self._detokenizer.push(token))


class Generation(Iterator[Token]):
    """Tokens of a batch as they come; made by `Model.stream`.

    Attributes:
        counts: calls and guesses so far; see `Counts`.
    """

    def __init__(self, tokens: Iterator[Token], rows: Sequence[Row], counts: Counts) -> None:
        self._tokens, self._rows = tokens, rows
        self.counts = counts

    def __next__(self) -> Token:
        return next(self._tokens)

    @property
    def pending(self) -> np.ndarray:
        """The last token of each row, int64 [B]: chosen, and not read by the session yet; see `Session.save`."""
        return np.array([row.last for row in self._rows], dtype=np.int64)

    def completions(self) -> list[Completion]:
        """Generate what is left, and gather it by row."""
        found = [Completion() for _ in self._rows]
        for token in self:
            found[token.row].add(token)
        return found


@dataclass
class Counts:
    """What a generation took.

    Attributes:
        tokens: tokens chosen, all rows together.
        calls: calls of the model after the prompt.
        drafted: tokens that were guessed ahead.
        accepted: guesses that were the token.
    """

    tokens: int = 0
    calls: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the guesses that were right; 0 without guesses."""
        return self.accepted / self.drafted if self.drafted else 0.0


def plain(session: Session, prompts: Sequence[np.ndarray], rows: Sequence[Row], counts: Counts) -> Iterator[Token]:
    """Read ``prompts`` and continue every row of ``rows`` until it finishes, one token per row and step."""
    if all(row.finished for row in rows):
        return
    logits = session.prefill(*padded(prompts))
    while True:
        live = [index for index, row in enumerate(rows) if not row.finished]
        for index in live:
            counts.tokens += 1
            yield rows[index].choose(logits[index])
        tokens = np.array([row.last for row in rows], dtype=np.int64)
        lengths = np.array([not row.finished for row in rows], dtype=np.int64)
        if not lengths.any():
            return
        counts.calls += 1
        logits = session.decode(tokens, lengths)


def padded(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of any lengths as int64 [B, S], padded on the right with 0, and their lengths [B]."""
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    tokens = np.zeros((len(prompts), int(lengths.max())), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, lengths


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
