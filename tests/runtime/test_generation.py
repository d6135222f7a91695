"""Generation of batches against the model's definition, and each option against its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from tests.runtime import fake_model
from tests.runtime.fake_model import EOS, MAX_CONTEXT, VOCAB, expected_logits
from tests.runtime.test_model import greedy
from v4c.errors import InputError
from v4c.runtime import Model, load
from v4c.runtime.generation import Completion, Options
from v4c.runtime.writer import ArtifactWriter

PROMPTS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=4)


def ids(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module")
def speaking(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The fake model with a tokenizer of bytes: letters, and the three bytes of the euro sign."""
    folder = tmp_path_factory.mktemp("speaking")
    euro = ["\u00e2", "\u0124", "\u00ac"]  # as ByteLevel spells E2, 82 and AC
    letters = [*"abcdefghijklmnopqrstu", *euro]
    raw = RawTokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.save(str(folder / "tokenizer.json"))
    with ArtifactWriter(folder / "a.v4c") as writer:
        writer.write_library(library)
        writer.copy_tokenizer(folder / "tokenizer.json")
        writer.declare_weights(fake_model.WEIGHTS)
        for name, array in fake_model.weights().items():
            writer.write_weight(name, array)
        writer.finish(fake_model.manifest())
    return load(folder / "a.v4c")


@settings(deadline=None, max_examples=30)
@given(prompts=PROMPTS, count=st.integers(0, 20), eos=st.booleans())
def test_rows_of_a_batch_do_not_see_each_other(model: Model, prompts: list[list[int]], count: int, eos: bool) -> None:
    found = model.complete(prompts, Options(max_new_tokens=count, eos=eos))
    assert ids(found) == [greedy(prompt, count, eos) for prompt in prompts]


def test_a_finished_row_idles_while_others_go_on(model: Model) -> None:
    prompts = [[token, token] for token in range(VOCAB)]
    with model.new_session(VOCAB, max_context=40) as session:
        found = model.complete(prompts, Options(max_new_tokens=30), session=session)
        lengths = [len(completion.token_ids) for completion in found]
        assert len(set(lengths)) > 1, "rows should end at different steps"
        assert session.position.tolist() == [2 + length - 1 for length in lengths]
        # The state of a row that ended early is whole: it reads its last token, and goes on as if alone.
        logits = session.decode([completion.token_ids[-1] for completion in found])
    for prompt, completion, row in zip(prompts, found, logits, strict=True):
        np.testing.assert_array_equal(row, expected_logits(np.array(prompt + completion.token_ids))[-1])
        assert completion.finish == ("eos" if completion.token_ids[-1] == EOS else "length")


def test_a_stream_gives_a_token_of_every_live_row_per_step(model: Model) -> None:
    tokens = list(model.stream([[1], [2, 3]], Options(max_new_tokens=3, eos=False)))
    assert [token.row for token in tokens] == [0, 1, 0, 1, 0, 1]
    assert [token.finish for token in tokens] == [None] * 4 + ["length"] * 2


def test_rows_draw_as_batches_of_one_would(model: Model) -> None:
    prompts = [[1, 2], [3], [1, 2]]
    options = [Options(12, temperature=4.0, top_p=0.95, top_k=12, min_p=0.01, seed=seed, eos=False) for seed in (5, 6)]
    together = ids(model.complete(prompts, options[0]))
    assert together[0] == ids(model.complete([prompts[0]], options[0]))[0]
    assert together[1] == ids(model.complete([prompts[1]], options[1]))[0]
    assert together[0] != together[2], "equal prompts should be continued differently"


def test_log_probabilities_are_the_models(model: Model) -> None:
    forbidden = greedy([4, 5], 1, False)[0]

    def processor(tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
        logits[forbidden] = -np.inf
        return logits

    (found,) = model.complete([4, 5], Options(6, temperature=9.0, seed=1, eos=False, logprobs=3, processor=processor))
    logits = expected_logits(np.array([4, 5, *found.token_ids]))[1:-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(
        1, keepdims=True
    )  # fmt: skip
    for step, token in enumerate(found.token_ids):
        assert found.logprobs[step] == pytest.approx(expected[step, token])
        top = found.top_logprobs[step]
        order = sorted(range(VOCAB), key=lambda other: (-expected[step, other], other))
        assert [other for other, _ in top] == order[:3]
        assert [value for _, value in top] == pytest.approx(expected[step, order[:3]])
    assert found.top_logprobs[0][0][0] == forbidden
    assert forbidden not in found.token_ids


def test_a_processor_sees_its_row_and_decides(model: Model) -> None:
    seen: list[list[int]] = []

    def backwards(tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append(tokens.tolist())
        wanted = np.full_like(logits, -np.inf)
        wanted[(tokens[-1] + VOCAB - 1) % VOCAB] = 0
        return wanted

    assert list(model.generate([9], 4, processor=backwards, eos=False)) == [8, 7, 6, 5]
    assert seen == [[9], [9, 8], [9, 8, 7], [9, 8, 7, 6]]
    with pytest.raises(InputError, match=r"processor: expected logits of shape \[24\], found NoneType"):
        next(iter(model.generate([9], 4, processor=lambda tokens, logits: None)))  # type: ignore[arg-type, return-value]


def spell(model: Model, text: str, stop: tuple[str, ...] = (), **options: Any) -> Completion:
    """Make the model say ``text`` after a prompt, whatever it thinks."""
    wanted = model.tokenizer.encode(text)

    def processor(tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
        logits[wanted[len(tokens) - 1]] = 1e9
        return logits

    (found,) = model.complete([0], Options(len(wanted), eos=False, stop=stop, processor=processor, **options))
    return found


@pytest.mark.parametrize("stop", [(), ("cb",), ("zz",), ("€",), ("b", "abc")])
def test_text_and_stop_strings_that_span_tokens(speaking: Model, stop: tuple[str, ...]) -> None:
    text = "ab€acba€abc"
    found = spell(speaking, text, stop)
    ends = [text.index(s) + len(s) for s in stop if s in text]
    expected = min((text[: text.index(s)] for s in stop if s in text), key=len, default=text)
    assert found.text == expected
    assert found.finish == ("stop" if ends else "length")
    read = speaking.tokenizer.encode(text[: min(ends)] if ends else text)
    assert found.token_ids == read.tolist(), "the row ends with the token that completes the stop string"


def test_pieces_are_whole_characters(speaking: Model) -> None:
    wanted = speaking.tokenizer.encode("€€a")

    def processor(tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
        logits[wanted[len(tokens) - 1]] = 1e9
        return logits

    pieces = [token.text for token in speaking.stream([0], Options(7, eos=False, processor=processor))]
    assert pieces == ["", "", "€", "", "", "€", "a"]
    unfinished = spell(speaking, "a€").token_ids[:-1]
    assert len(unfinished) == 3
    cut = [token.text for token in speaking.stream([0], Options(2, eos=False, processor=processor))]
    assert cut == ["", "\ufffd"], "bytes that stay unfinished show at the end only"


def test_texts_in_and_out(speaking: Model) -> None:
    found = speaking.complete(["ab", "cde"], Options(8, eos=False))
    assert ids(found) == [greedy(speaking.tokenizer.encode(text).tolist(), 8, False) for text in ("ab", "cde")]
    assert [c.text for c in found] == [speaking.tokenizer.decode(c.token_ids) for c in found]


def test_the_text_of_an_end_token_is_left_out(speaking: Model) -> None:
    found = [c for c in speaking.complete([[token] for token in range(VOCAB)], Options(30)) if c.finish == "eos"]
    assert found
    for completion in found:
        assert completion.token_ids[-1] == EOS
        assert completion.text == speaking.tokenizer.decode(completion.token_ids[:-1])
    stopped = speaking.complete([1], Options(30, eos=False, stop_token_ids=[found[0].token_ids[0]]))
    assert "eos" in [completion.finish for completion in stopped] or len(stopped[0].token_ids) == 30


def test_a_session_is_continued(model: Model) -> None:
    with model.new_session(1, max_context=30) as session:
        first = list(model.generate([1, 2, 3], 5, eos=False, session=session))
        assert session.position.tolist() == [7]
        more = list(model.generate([first[-1], 9], 5, eos=False, session=session))
    assert more == greedy([1, 2, 3, *first, 9], 5, False)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: expected integers, found float64"),
        ([[]], {}, "prompts[0]: expected"),
        ([[1], []], {}, "prompts[1]: expected"),
        ([[1], [VOCAB]], {}, f"prompts[1][0]: expected 0 to {VOCAB - 1}, found {VOCAB}"),
        ("ab", {}, "expected a tokenizer"),
        ([[1], "ab"], {}, "expected a tokenizer"),
        ([[1], [1] * MAX_CONTEXT], {"max_new_tokens": 2}, f"prompts: expected at most {MAX_CONTEXT} tokens"),
        ([1], {"stop": ["x"]}, "stop: expected an artifact with a tokenizer"),
        ([1], {"speculative": True}, "speculative: expected an artifact with a multi-token-prediction layer"),
    ],
)
def test_bad_prompts_are_refused_at_once(model: Model, prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        model.stream(prompts, Options(**options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: expected an integer of at least 0, found -1"),
        ({"top_k": -1}, "top_k: expected an integer of at least 0, found -1"),
        ({"min_p": 1.5}, "min_p: expected 0 to 1, found 1.5"),
        ({"logprobs": -1}, "logprobs: expected an integer of at least 0, found -1"),
        ({"stop": [""]}, "stop: expected strings that are not empty, found ''"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids: expected an integer of at least 0, found 1.5"),
        ({"processor": 3}, "processor: expected a function of token ids and logits, found 3"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Options(**options)
    assert str(caught.value) == message


def test_a_session_of_other_rows_is_refused(model: Model) -> None:
    with model.new_session(2) as session, pytest.raises(InputError, match="session: expected a session of 1 rows"):
        model.generate([1], session=session)
    with model.new_session(1) as session, pytest.raises(InputError, match="no max_context beside a session"):
        model.generate([1], session=session, max_context=9)
