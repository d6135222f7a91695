"""The tokenizer: byte-level BPE, trained on the training text and the recall task's sentences."""

from __future__ import annotations

from itertools import product

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from examples.train_nano.config import BOS, EOS, PAD, VOCABULARY
from v4c.recall import KEYS, VALUES, sentence

SPECIAL = {BOS: "<|begin|>", EOS: "<|end|>", PAD: "<|pad|>"}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A tokenizer of `VOCABULARY` entries that puts ``<|begin|>`` before every text it encodes.

    All sentences of the recall task are among the texts, so that its words are single tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SPECIAL[number] for number in sorted(SPECIAL)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    facts = [sentence(key, value) for key, value in product(KEYS, VALUES)]
    tokenizer.train_from_iterator([*texts, *facts * 8], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return tokenizer


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in a row, ``<|end|>`` after each: ``[n]`` int64."""
    rows = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*row.ids, EOS], np.int64) for row in rows])


def compressed_ids(tokenizer: Tokenizer) -> np.ndarray:
    """``[V]`` int64: Engram's lookup from token ids to compressed ids, which tokens of equal normalised text share.

    Normalised is: without white space around, in lower case (Engram paper, section 2.2).
    """
    groups: dict[str, int] = {}
    table = np.empty(VOCABULARY, np.int64)
    for token in range(VOCABULARY):
        raw = tokenizer.id_to_token(token)
        text = tokenizer.decode([token], skip_special_tokens=False)
        key = text.strip().lower() if text.strip() and "\N{REPLACEMENT CHARACTER}" not in text else f"\0{raw}"
        table[token] = groups.setdefault(key, len(groups))
    return table
