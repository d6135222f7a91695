"""Text in and out with a byte-level tokenizer, whose every token is one byte: the hardest case for streaming."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from v4c.errors import ArtifactError, InputError
from v4c.runtime import Model
from v4c.runtime.text import Detokenizer, Tokenizer

STOP = "<stop>"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(STOP, special=True)])
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    raw.save(str(file))
    return file


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(tokenizer_file)


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=20))
def test_streaming_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    # A character appears with its last byte, not later.
    assert [len(piece) for piece in pieces] == [
        int(last) for character in text for last in [False] * (len(character.encode()) - 1) + [True]
    ]
    assert "".join(pieces) == text
    assert stream.flush() == ""


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(0, 255), max_size=12))
def test_streaming_any_bytes_gives_the_whole_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_an_unfinished_character_appears_when_flushed(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer)
    ids = tokenizer.encode("a€")
    assert [stream.push(token) for token in ids[:-1]] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(tokenizer.encode("b")[0]) == "b"


def test_control_tokens_are_left_out_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{STOP}b")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{STOP}b"
    for skip, expected in ((True, "ab"), (False, f"a{STOP}b")):
        stream = Detokenizer(tokenizer, skip_special_tokens=skip)
        assert "".join(stream.push(token) for token in ids) == expected


def test_a_missing_package_is_named(tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="the package tokenizers is not installed: install it, or pass token ids"):
        Tokenizer(tokenizer_file)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for file in (tmp_path / "tokenizer.json", tmp_path / "nothing.json"):
        with pytest.raises(ArtifactError, match=f"{file.name}: expected a tokenizer, found"):
            Tokenizer(file)


def test_a_model_without_tokenizer_says_so(model: Model) -> None:
    with pytest.raises(InputError, match="expected a tokenizer, found none: pass token ids"):
        _ = model.tokenizer
