"""How good a model is, on whatever runs it: bits per byte on a text, and recall of facts by distance.

Both are computed from logits alone, so a compiled artifact of any target and quantisation, a checkpoint in torch and an
exported file in ONNX Runtime are measured alike and their figures may be compared.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import InputError
from v4c.evaluation_models import Reader, open_reader
from v4c.progress import Progress
from v4c.recall import CHANCE, DISTANCES, Facts, Question, question
from v4c.runtime.inputs import checked_count
from v4c.runtime.text import Tokenizer

__all__ = ["CONTEXT", "evaluate", "heldout_text"]

CONTEXT = 512
"""Tokens of a piece of text that is read at once."""
_LOGITS_BYTES = 1 << 28


def heldout_text() -> str:
    """What the trained model of the examples has not read: pages of Python's documentation (PSF licence, version 2)."""
    return files("v4c").joinpath("data", "heldout.txt").read_text(encoding="utf-8")


def evaluate(
    model: str | os.PathLike[str] | Reader,
    *,
    text: str | None = None,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    context: int = CONTEXT,
    max_tokens: int | None = None,
    distances: Sequence[int] = DISTANCES,
    questions: int = 32,
    seed: int = 0,
    hide_rows: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        model: an artifact folder, a checkpoint folder (read by torch), an ``.onnx`` file that v4c exported (read by
            ONNX Runtime), or an opened one (`v4c.evaluation_models.open_reader`).
        text: what to read; None takes `heldout_text`.
        tokenizer: a ``tokenizer.json``; None takes the model's own. ONNX files have none.
        context: tokens of each piece of the text, read from an empty cache, the begin-of-text token before it.
        max_tokens: read the first tokens of the text only.
        distances: in tokens, between a fact and the question for it; empty for no questions.
        questions: for each distance; they are the same for every model with this tokenizer and `seed`.
        seed: of the questions.
        hide_rows: hide every compressed row, so that only the sliding windows are left: what recall must fail
            without. Of checkpoints only.
        threads: per kernel; None as `v4c.load`.
        progress: called with (what, done, total).

    Returns:
        ``{model, kind, target, weights, text: {tokens, bytes, context, bits_per_byte}, recall: [{distance, questions,
        accuracy}], chance, hide_rows}``. `accuracy` is the share of questions for which the likeliest token begins the
        stated value; `chance` that of a guess among the values.

    Raises:
        InputError: an argument out of range, no tokenizer, or a text of no tokens.
        UnsupportedError: `hide_rows` of another than a checkpoint.
        v4c.Error: the model cannot be loaded.
    """
    context, questions = checked_count(context, "context", 2), checked_count(questions, "questions", 1)
    if max_tokens is not None:
        max_tokens = checked_count(max_tokens, "max_tokens", 1)
    for distance in distances:
        checked_count(distance, "distance", 1)
    report = progress or (lambda what, done, total: None)
    report("load", 0, 1)
    reader = open_reader(model, hide_rows, threads) if isinstance(model, str | os.PathLike) else model
    words = _tokenizer(reader, tokenizer)
    lead = tuple(words.encode("").tolist())
    read = heldout_text() if text is None else text
    ids = words.encode(read, add_special_tokens=False)
    if ids.size == 0:
        raise InputError("text: expected at least one token, found none")
    if int(ids.max()) >= reader.vocab_size:
        raise InputError(f"tokenizer: expected ids below the model's {reader.vocab_size}, found {ids.max()}")
    kept = ids if max_tokens is None else ids[:max_tokens]
    read = read if len(kept) == len(ids) else words.decode(kept, skip_special_tokens=False)
    measured = _bits_per_byte(reader, kept, len(read.encode()), lead, context, words, report)
    recalled = []
    if distances:
        facts = Facts.of(lambda part: words.encode(part, add_special_tokens=False).tolist())
        for number, distance in enumerate(distances):
            rng = np.random.default_rng([seed, distance])
            asked = [question(facts, ids, distance, rng, lead) for _ in range(questions)]
            report(f"recall at {distance} tokens", number, len(distances))
            recalled.append({"distance": distance, "questions": questions, "accuracy": _recall(reader, asked)})
    report("done", 1, 1)
    return {
        "model": reader.name,
        "kind": reader.kind,
        "target": reader.target,
        "weights": reader.weights,
        "text": measured,
        "recall": recalled,
        "chance": CHANCE,
        "hide_rows": hide_rows,
    }


def _tokenizer(reader: Reader, tokenizer: str | os.PathLike[str] | Tokenizer | None) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer is not None:
        return Tokenizer(tokenizer)
    if reader.tokenizer is None:
        raise InputError(f"{reader.name}: expected a tokenizer, found none: name one")
    return Tokenizer(reader.tokenizer) if isinstance(reader.tokenizer, Path) else reader.tokenizer


def _bits_per_byte(
    reader: Reader,
    ids: np.ndarray,
    size: int,
    lead: tuple[int, ...],
    context: int,
    words: Tokenizer,
    report: Progress,
) -> dict[str, Any]:
    """Every token is predicted once, from those before it in its piece; without a begin-of-text token a piece's first
    token only starts it, and its bytes do not count."""
    pieces = [ids[start : start + context] for start in range(0, len(ids), context)]
    if not lead:
        size -= sum(len(words.decode(piece[:1], skip_special_tokens=False).encode()) for piece in pieces)
    if size <= 0:
        raise InputError("text: expected more than the first token of each piece, found no more")
    bits, scored = 0.0, 0
    rows = max(1, min(8, _LOGITS_BYTES // (4 * reader.vocab_size * (context + len(lead)))))
    for start in range(0, len(pieces), rows):
        report("text", start, len(pieces))
        group = pieces[start : start + rows]
        length = max(map(len, group)) + len(lead)
        tokens = np.zeros((len(group), length), np.int64)
        for row, piece in enumerate(group):
            tokens[row, : len(lead) + len(piece)] = [*lead, *piece]
        logits = reader.all_logits(tokens)
        for row, piece in enumerate(group):
            first = max(len(lead), 1)
            targets = tokens[row, first : len(lead) + len(piece)]
            bits += float(_costs(logits[row, first - 1 : first - 1 + len(targets)], targets).sum()) / math.log(2)
            scored += len(targets)
    return {"tokens": scored, "bytes": size, "context": context, "bits_per_byte": bits / size}


def _costs(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """``-log softmax(logits)[target]`` in nats: ``[n, V]`` and ``[n]`` -> ``[n]`` float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(targets)), targets]


def _recall(reader: Reader, asked: Sequence[Question]) -> float:
    """Share of right answers; prompts of one length are read together."""
    right = 0
    lengths = sorted({len(one.ids) for one in asked})
    for length in lengths:
        group = [one for one in asked if len(one.ids) == length]
        for start in range(0, len(group), 8):
            part = group[start : start + 8]
            best = reader.last_logits(np.stack([one.ids for one in part])).argmax(-1)
            right += int((best == [one.answer for one in part]).sum())
    return right / len(asked)
