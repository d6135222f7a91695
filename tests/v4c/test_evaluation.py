"""Evaluation: known models get their known figures, and every way to run a model gives the same ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

import v4c
from tests.v4c.cli_harness import assert_one_line, invoke, shell
from v4c.errors import InputError, UnsupportedError
from v4c.evaluation import evaluate, heldout_text
from v4c.evaluation_models import TorchReader
from v4c.recall import KEYS, VALUES, sentence
from v4c.runtime.text import Tokenizer

BYTES = (b"A text of some length, read in pieces. " * 8).decode()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in which the recall task's words are single tokens; it begins texts with ``<bos>``, which is 0."""
    tokenizer = BPE(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    facts = [sentence(key, value) for key in KEYS for value in VALUES]
    tokenizer.train_from_iterator([heldout_text(), *facts], trainer)
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@dataclass
class Copier:
    """A model that predicts what followed the last three tokens before, if that is within its reach; else uniformly."""

    tokenizer: Tokenizer | Path | None
    vocab_size: int
    reach: int = 10**6
    name: str = "copier"
    kind: str = "artifact"
    target: str = "python"
    weights: str = "none"
    longest: int = field(default=0)

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        self.longest = max(self.longest, ids.shape[1])
        return np.zeros((*ids.shape, self.vocab_size), np.float32)

    def last_logits(self, ids: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(ids), self.vocab_size), np.float32)
        for row, tokens in enumerate(ids.tolist()):
            for place in range(max(0, len(tokens) - self.reach), len(tokens) - 3):
                if tokens[place : place + 3] == tokens[-3:]:
                    logits[row, tokens[place + 3]] = 1
        return logits


def test_uniform_model(words: Path) -> None:
    """Uniform logits cost log2(V) bits a token, every token counts once, and no piece is longer than said."""
    reader = Copier(words, 2000)
    text = heldout_text()
    result = evaluate(reader, context=100, distances=())
    tokens = BPE.from_file(str(words)).encode(text, add_special_tokens=False).ids
    assert result["text"]["tokens"] == len(tokens)
    assert result["text"]["bytes"] == len(text.encode())
    assert result["text"]["bits_per_byte"] == pytest.approx(len(tokens) * math.log2(2000) / len(text.encode()))
    assert reader.longest == 101
    assert result["recall"] == []


def test_without_a_token_that_begins_texts(tiny_checkpoint: Path) -> None:
    """A tokenizer of bytes: each piece's first byte is given, the others cost 8 bits of 256."""
    reader = Copier(tiny_checkpoint / "tokenizer.json", 256 + 64)
    result = evaluate(reader, text=BYTES, context=50, distances=())
    pieces = -(-len(BYTES) // 50)
    assert result["text"]["tokens"] == result["text"]["bytes"] == len(BYTES) - pieces
    assert result["text"]["bits_per_byte"] == pytest.approx(math.log2(320))


def test_recall_counts_what_is_copied(words: Path) -> None:
    far = evaluate(Copier(words, 2000), max_tokens=50, distances=(24, 300), questions=9)
    near = evaluate(Copier(words, 2000, reach=40), max_tokens=50, distances=(24, 300), questions=9)
    assert [row["accuracy"] for row in far["recall"]] == [1, 1]
    assert [row["accuracy"] for row in near["recall"]] == [1, 0]
    assert [row["distance"] for row in far["recall"]] == [24, 300]
    assert far["chance"] == 1 / 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 1}, "context: expected"),
        ({"questions": 0}, "questions: expected"),
        ({"max_tokens": 0}, "max_tokens: expected"),
        ({"distances": (0,)}, "distance: expected"),
        ({"text": ""}, "text: expected at least one token"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str, words: Path) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(Copier(words, 2000), **arguments)


def test_tokenizers_that_do_not_fit(words: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer: expected ids below the model's 300"):
        evaluate(Copier(words, 300))
    with pytest.raises(InputError, match="copier: expected a tokenizer, found none"):
        evaluate(Copier(None, 2000))


def test_every_way_to_run_it(tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    """The artifact, torch and ONNX Runtime (all tokens at once, and one by one) agree to 1e-4 bits per byte."""
    last, every = tmp_path / "last.onnx", tmp_path / "every.onnx"
    v4c.export(tiny_checkpoint, last)
    v4c.export(tiny_checkpoint, every, all_logits=True)
    words = tiny_checkpoint / "tokenizer.json"
    figures = [
        evaluate(model, text=BYTES, tokenizer=words, context=120, distances=(), threads=threads)
        for model, threads in ((tiny_checkpoint, None), (tiny_artifact, None), (last, 1), (every, 1))
    ]
    assert [one["kind"] for one in figures] == ["checkpoint", "artifact", "onnx", "onnx"]
    bits = [one["text"]["bits_per_byte"] for one in figures]
    assert max(bits) - min(bits) < 1e-4
    assert bits[0] > 5  # random weights
    with pytest.raises(UnsupportedError, match="expected a checkpoint to hide"):
        evaluate(tiny_artifact, hide_rows=True)


def test_hidden_rows_change_far_tokens_only(tiny_checkpoint: Path) -> None:
    """Nothing differs until the first compressed row is complete, at the fourth token."""
    ids = np.random.default_rng(0).integers(0, 320, (2, 150))
    whole, hidden = (TorchReader(tiny_checkpoint, hide).all_logits(ids) for hide in (False, True))
    np.testing.assert_allclose(whole[:, :3], hidden[:, :3], rtol=0, atol=1e-5)
    assert (np.abs(whole - hidden).max(axis=(0, 2))[10:] > 1e-3).all()


def test_command(tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(BYTES)
    result = shell(["eval", tiny_artifact, tiny_checkpoint, "--no-recall", "--text", text, "--json"])
    assert (result.returncode, result.stderr) == (0, "")
    ours, theirs = json.loads(result.stdout)
    assert (ours["kind"], theirs["kind"]) == ("artifact", "checkpoint")
    assert ours["text"] == pytest.approx(theirs["text"], abs=1e-4)
    table = invoke("eval", tiny_checkpoint, "--no-recall", "--text", text, "--max-tokens", "60", "--hide-rows")
    assert table.exit_code == 0
    assert "59 tokens, 59 bytes, in pieces of 512 tokens" in table.stdout
    assert "+0.000%" in table.stdout


def test_command_refuses(tiny_checkpoint: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert_one_line(invoke("eval", missing), str(missing))
    assert_one_line(invoke("eval", tmp_path / "missing.onnx"), "expected an ONNX file, found none")
    assert_one_line(invoke("eval", tiny_checkpoint, "--text", missing), str(missing), "expected a text")
    assert_one_line(invoke("eval", tiny_checkpoint, "--no-recall", "--distance", "64"), "--distance and --no-recall")
    assert_one_line(invoke("eval", tiny_checkpoint), "values' first tokens differ")
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"junk")
    assert_one_line(invoke("eval", junk), "expected a model that ONNX Runtime opens")
