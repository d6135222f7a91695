"""Speculative decoding with the multi-token-prediction (MTP) layer (DeepSeek-V3, arXiv 2412.19437, section 2.2).

A step reads two tokens per row at once: the one that was chosen, and the MTP layer's guess of the one after it. From
the logits after the first the next token is chosen as always. If the guess was that token, the logits after the second
hold too, and the step gave two tokens; if not, the second token is taken back (`Session.rewind`), and the step gave
one. Guesses never decide what is generated, so this serves sampling, stop strings and processors as well as greedy
choice (Leviathan et al., 2023, with the target's own choice in place of the acceptance test).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from v4c.errors import InputError
from v4c.runtime.generation import Counts, Row, Token, padded
from v4c.runtime.manifest import Manifest
from v4c.runtime.session import Session

CHUNK = 512
"""Most tokens per row of a prompt that are read at once."""


def check_speculation(manifest: Manifest) -> None:
    """Refuse a model that cannot guess ahead.

    Raises:
        InputError: the artifact has no MTP layer, or a ring in which a token and its guess would share a slot.
    """
    if manifest.mtp is None:
        raise InputError("speculative: expected an artifact with a multi-token-prediction layer, found none")
    for cache in manifest.caches:
        if cache.ratio is None and isinstance(cache.shape[1], int) and cache.shape[1] < 2:
            raise InputError(f"speculative: expected rings of at least 2 tokens, found cache {cache.name} with 1")


def speculative(
    session: Session, prompts: Sequence[np.ndarray], rows: Sequence[Row], counts: Counts
) -> Iterator[Token]:
    """As `generation.plain`, with up to two tokens per row and step."""
    if all(row.finished for row in rows):
        return
    drafter = Drafter(session)
    logits = drafter.read(*padded(prompts))
    live = np.array([not row.finished for row in rows])
    chosen = [[row.choose(logits[index])] if live[index] else [] for index, row in enumerate(rows)]
    streams = drafter.last[:, None]
    while True:
        counts.tokens += sum(map(len, chosen))
        for tokens in chosen:
            yield from tokens
        live = np.array([not row.finished for row in rows])
        if not live.any():
            return
        guesses = drafter.guess(chosen, live, streams)
        # A guess is read only where the row may go on behind it, and there is room for it.
        wanted = live & np.array([row.left > 1 for row in rows]) & (session.position + 2 <= session.max_context)
        pairs = np.stack([np.array([row.last for row in rows]), guesses], axis=1)
        mark = session.mark()
        logits, streams = session.read_streams(pairs, live.astype(np.int64) + wanted, all_logits=True)
        try:
            chosen = [_choose(row, logits[r], int(guesses[r]), bool(wanted[r])) for r, row in enumerate(rows)]
        except BaseException:  # a processor's, or Ctrl-C: leave the state of plain decoding
            session.rewind(mark, wanted)
            raise
        kept = np.array([len(tokens) for tokens in chosen])
        session.rewind(mark, wanted & (kept < 2))
        counts.calls += 1
        counts.drafted += int(wanted.sum())
        counts.accepted += int((kept == 2).sum())


def _choose(row: Row, logits: np.ndarray, guess: int, guessed: bool) -> list[Token]:
    """The tokens that a step gave a row: none if it idles, two if its guess was right."""
    if row.finished:
        return []
    tokens = [row.choose(logits[0])]
    if guessed and tokens[0].id == guess and not row.finished:
        tokens.append(row.choose(logits[1]))
    return tokens


class Drafter:
    """Feeds the MTP layer of a session with what the session reads.

    The layer takes pairs: the streams of a token and the id of the next one. A token that was read by other calls has
    no pair, which costs accuracy of the guesses only.

    Attributes:
        last: float32 [B, M, D], the streams of each row's last token.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.last = np.zeros((session.batch, 0, 0), dtype=np.float32)

    def read(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Have the session read prompts [B, S]; the logits [B, V] after them, NaN for a row of length 0."""
        result: np.ndarray | None = None
        known = np.zeros(len(tokens), dtype=bool)
        for start in range(0, int(lengths.max()), CHUNK):
            live = np.clip(lengths - start, 0, CHUNK)
            piece = tokens[:, start : start + int(live.max())]
            before = self._session.position
            logits, streams = self._session.read_streams(piece, live)
            if result is None:
                result = np.full_like(logits, np.nan)
                self.last = np.zeros((len(tokens), *streams.shape[2:]), dtype=np.float32)
            result[live > 0] = logits[live > 0]
            self._follow(piece, live, before, streams, known)
            read = np.flatnonzero(live)
            self.last[read] = streams[read, live[read] - 1]
            known[read] = True
        assert result is not None
        return result

    def guess(self, chosen: Sequence[Sequence[Token]], live: np.ndarray, streams: np.ndarray) -> np.ndarray:
        """Guesses int64 [B] of the token after the last of ``chosen``, of which ``streams`` [B, S, M, D] belong to the
        tokens before each; of rows that are not ``live``, whatever."""
        lengths = np.array([len(tokens) if go else 0 for tokens, go in zip(chosen, live, strict=True)])
        ids = np.zeros(streams.shape[:2], dtype=np.int64)
        for row, tokens in enumerate(chosen):
            ids[row, : len(tokens)] = [token.id for token in tokens]
        positions = self._session.position - lengths
        return np.asarray(self._session.draft(ids, positions, lengths, streams).argmax(axis=-1))

    def _follow(
        self, tokens: np.ndarray, live: np.ndarray, positions: np.ndarray, streams: np.ndarray, known: np.ndarray
    ) -> None:
        """Pair the tokens of a chunk that starts at ``positions`` with the streams before them."""
        ids, before = tokens.copy(), np.empty_like(streams)
        before[:, 1:] = streams[:, :-1]
        before[:, 0] = self.last
        first = ~known  # no streams before the first token: its pair is left out
        ids[first, :-1], before[first, :-1] = tokens[first, 1:], streams[first, :-1]
        lengths = np.maximum(live - first, 0)
        if lengths.any():
            self._session.draft(ids, positions - ~first, lengths, before)
