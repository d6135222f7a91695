"""Speculative decoding on a compiled model with an MTP layer: the same tokens, bit for bit, in fewer steps.

The model is random, so its MTP layer guesses no better than chance; guesses that are right are put in its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speculative import compare
from tests.made_once import made_once
from tests.v4c.cli_harness import invoke
from v4c.api import compile as compile_model
from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import initialise
from v4c.frontend.model.caches import allocate
from v4c.frontend.model.model import V4Model
from v4c.frontend.model.mtp import MTPModel, allocate_mtp
from v4c.runtime import Model, load
from v4c.runtime.generation import Completion, Options, Token
from v4c.runtime.sampling import Sampler
from v4c.runtime.speculation import Drafter

PROMPT = 130
"""Tokens: some more than the window of the model."""


@pytest.fixture(scope="module")
def checkpoint(tiny_engram: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with Engram, whose rings are the smallest, and an MTP layer."""
    folder = tmp_path_factory.mktemp("mtp") / "checkpoint"
    initialise(replace(tiny_engram, num_nextn_predict_layers=1), folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint`, compiled; workers of one run share it."""
    return made_once(tmp_path_factory, "mtp.v4c", lambda path: compile_model(checkpoint, path))


@pytest.fixture(scope="module")
def model(artifact: Path) -> Model:
    return load(artifact)


def prompt(model: Model, length: int = PROMPT, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.vocab_size, length)


def put_guesses(monkeypatch: pytest.MonkeyPatch, answers: list[list[int]], prompts: list[int], right: float) -> None:
    """Guess each row's answer with the probability ``right``, and a wrong token otherwise."""
    random = np.random.default_rng(11)

    def guess(self: Drafter, chosen: Sequence[Sequence[Token]], live: np.ndarray, streams: np.ndarray) -> np.ndarray:
        found = []
        for row, answer in enumerate(answers):
            index = int(self._session.position[row]) - prompts[row] + 1
            token = answer[index] if index < len(answer) else 0
            found.append(token if random.random() < right else (token + 1) % 320)
        return np.array(found)

    monkeypatch.setattr(Drafter, "guess", guess)


def test_two_tokens_at_once_are_one_after_the_other_bit_for_bit(model: Model) -> None:
    """What exactness rests on: neither logits nor state depend on whether a token is read alone or with a second."""
    tokens = prompt(model, 420)
    with model.new_session(1, 512) as alone, model.new_session(1, 512) as pairs:
        for session in (alone, pairs):
            session.prefill(tokens[None, :PROMPT])
        for at in range(PROMPT, 420, 2):
            expected = [alone.decode(tokens[at + i : at + i + 1])[0] for i in (0, 1)]
            logits, _ = pairs.read_streams(tokens[None, at : at + 2], np.array([2]), all_logits=True)
            np.testing.assert_array_equal(logits[0], expected)
        for one, other in zip(alone._caches.arrays, pairs._caches.arrays, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_token_taken_back_leaves_no_trace(model: Model) -> None:
    """Windows of 4 and of 128 tokens, the sliding window and Engram's rings are all passed on the way."""
    tokens, wrong = prompt(model, 400), prompt(model, 400, seed=1)
    with model.new_session(1, 512) as plain, model.new_session(1, 512) as taken:
        for session in (plain, taken):
            session.prefill(tokens[None, :100])
        for at in range(100, 400):
            expected = plain.decode(tokens[at : at + 1])
            mark = taken.mark()
            pair = np.array([[tokens[at], wrong[at]]])
            logits, _ = taken.read_streams(pair, np.array([2]), all_logits=True)
            taken.rewind(mark, np.array([True]))
            np.testing.assert_array_equal(logits[:, 0], expected)
        assert plain.position.tolist() == taken.position.tolist() == [400]
        for spec, one, other in zip(model.manifest.caches, plain._caches.arrays, taken._caches.arrays, strict=False):
            written = slice(None) if spec.ratio is None else slice(0, 400 // spec.ratio)
            np.testing.assert_array_equal(one[:, written], other[:, written], err_msg=spec.name)


@pytest.fixture(scope="module")
def long(model: Model) -> list[Completion]:
    """2,000 tokens by plain decoding."""
    return model.complete([prompt(model)], Options(2000, eos=False))


@pytest.mark.parametrize("right", [None, 0.0, 0.5, 1.0])
def test_greedy_tokens_are_the_same(
    model: Model, long: list[Completion], monkeypatch: pytest.MonkeyPatch, right: float | None
) -> None:
    count = 2000
    options = Options(count, eos=False)
    (expected,) = long
    if right is not None:
        put_guesses(monkeypatch, [expected.token_ids], [PROMPT], right)
    stream = model.stream([prompt(model)], replace(options, speculative=True))
    (found,) = stream.completions()
    assert found == expected
    counts = stream.counts
    assert counts.tokens == count
    assert counts.calls + counts.accepted == count - 1, "each step gives a token, and one more for a right guess"
    if right == 1.0:
        assert counts.acceptance == 1.0
        assert counts.calls == count // 2
    elif right == 0.5:
        assert 0.45 < counts.acceptance < 0.55
        assert counts.calls < 0.75 * count


def test_draws_stops_and_log_probabilities_are_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = [[], []]

    def options(which: int, speculative: bool) -> Options:
        def processor(tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
            seen[which].append(int(tokens[-1]))
            logits[tokens[-1]] = -np.inf
            return logits

        return Options(
            120, 0.9, 0.95, 40, 0.01, seed=5, stop_token_ids=[7], logprobs=2, processor=processor,
            speculative=speculative,
        )  # fmt: skip

    expected = model.complete([prompt(model)], options(0, False))
    put_guesses(monkeypatch, [expected[0].token_ids], [PROMPT], 0.7)
    assert model.complete([prompt(model)], options(1, True)) == expected
    assert seen[0] == seen[1]


def test_rows_of_a_batch_accept_each_for_itself(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(model, length, seed=length) for length in (5, 131, 40)]
    options = Options(60, eos=False, stop_token_ids=[])
    expected = model.complete(prompts, options)
    ends = [completion.token_ids[15 * (row + 1)] for row, completion in enumerate(expected)]
    options = replace(options, stop_token_ids=ends)  # rows end at different steps
    expected = model.complete(prompts, options)
    put_guesses(monkeypatch, [c.token_ids for c in expected], [len(p) for p in prompts], 0.6)
    with model.new_session(3, 256) as session:
        stream = model.stream(prompts, replace(options, speculative=True), session=session)
        found = stream.completions()
        assert found == expected
        read = [len(p) + len(c.token_ids) - 1 for p, c in zip(prompts, found, strict=True)]
        assert session.position.tolist() == read, "a row's last token is chosen, not read"
    assert len(set(read)) == 3


def test_an_error_of_a_processor_leaves_the_state_of_plain_decoding(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = model.complete([prompt(model)], Options(30, eos=False))
    put_guesses(monkeypatch, [expected.token_ids], [PROMPT], 0.0)

    def failing(tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
        if len(tokens) == PROMPT + 10:
            raise RuntimeError("enough")
        return logits

    with model.new_session(1, 256) as session:
        with pytest.raises(RuntimeError, match="enough"):
            model.complete([prompt(model)], Options(30, processor=failing, speculative=True), session=session)
        assert session.position.tolist() == [PROMPT + 10]
        more = model.complete([expected.token_ids[10:11]], Options(10, eos=False), session=session)
    assert more[0].token_ids == expected.token_ids[11:21]


def test_a_full_context_is_filled(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = model.complete([prompt(model, 6)], Options(11, eos=False))
    put_guesses(monkeypatch, [expected.token_ids], [6], 1.0)
    (found,) = model.complete([prompt(model, 6)], Options(11, eos=False, speculative=True), max_context=16)
    assert found == expected


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> tuple[V4Model, MTPModel]:
    opened = Checkpoint.open(checkpoint)
    return V4Model.from_source(opened), MTPModel.from_source(opened)


def test_guesses_are_the_mtp_layers(model: Model, reference: tuple[V4Model, MTPModel]) -> None:
    """Logits of every guess against torch, with prompts of several lengths, by the pairs a generation feeds."""
    main, layer = reference
    config = main.config
    drafted: list[np.ndarray] = []
    with model.new_session(1, 256) as session:
        draft = session.draft

        def recorded(*arguments: np.ndarray) -> np.ndarray:
            drafted.append(draft(*arguments))
            return drafted[-1]

        session.draft = recorded  # type: ignore[method-assign]
        tokens = model.complete([prompt(model)], Options(30, eos=False, speculative=True), session=session)[0].token_ids
    whole = torch.from_numpy(np.array([*prompt(model), *tokens]))[None]
    size = whole.shape[1]
    where = torch.zeros(1, dtype=torch.int64), torch.tensor([size])
    with torch.no_grad():
        streams, _ = main.hidden(whole, *where, allocate(config, 1, size))
        pairs = torch.zeros(1, dtype=torch.int64), torch.tensor([size - 1])
        expected, _, _ = layer(
            streams[:, :-1], whole[:, 1:], *pairs, allocate_mtp(config, 1, size), all_logits=True
        )  # fmt: skip
    # The first call read the prompt; those after it guessed behind each choice. No guess of a random layer is right.
    guesses = drafted[1:]
    assert len(guesses) == 29
    found = np.concatenate([drafted[0], *guesses])
    np.testing.assert_allclose(found, expected[0, PROMPT - 2 : PROMPT + 28].numpy(), atol=2e-4)


def test_shared_weights_are_stored_once(model: Model) -> None:
    mtp = model.manifest.mtp
    assert mtp is not None
    names = [weight.name for weight in model.manifest.weights]
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(mtp.weights)
    assert len(set(names)) == len(names)
    assert all("mtp.0." in name for name in mtp.own_weights)
    assert set(mtp.weights) - set(mtp.own_weights) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_inspect_says_that_it_can(artifact: Path) -> None:
    assert json.loads(invoke("inspect", artifact, "--json").stdout)["mtp"] is True
    assert re.search(r"^mtp +yes$", invoke("inspect", artifact).stdout, re.MULTILINE)


def test_a_saved_session_goes_on_speculating(model: Model, tmp_path: Path) -> None:
    (expected,) = model.complete([prompt(model)], Options(60, eos=False))
    with model.new_session(1, PROMPT + 80) as session:
        stream = model.stream([prompt(model)], Options(30, eos=False, speculative=True), session=session)
        (first,) = stream.completions()
        session.save(tmp_path / "s", stream.pending)
    with model.restore_session(tmp_path / "s") as restored:
        assert restored.pending is not None
        (rest,) = model.complete([restored.pending], Options(30, eos=False, speculative=True), session=restored)
    assert first.token_ids + rest.token_ids == expected.token_ids


def test_run_speculates(artifact: Path) -> None:
    arguments = ["run", artifact, "--tokens", "5,6,7", "--max-new-tokens", "20", "--ignore-eos", "--json"]
    plain, faster = (invoke(*arguments, *more) for more in ((), ("--speculative",)))
    assert (plain.exit_code, faster.exit_code) == (0, 0), faster.stderr
    documents = [json.loads(result.stdout) for result in (plain, faster)]
    assert documents[0]["token_ids"] == documents[1]["token_ids"]
    assert set(documents[1]["speculative"]) == {"drafted", "accepted", "acceptance"}
    shown = invoke(*arguments[:-1], "--speculative")
    assert "guesses right" in shown.stderr


def test_the_layer_can_be_left_out(model: Model, checkpoint: Path, tmp_path: Path) -> None:
    plan = compile_model(checkpoint, tmp_path / "a", mtp=False, dry_run=True)
    assert isinstance(plan, dict)
    assert model.manifest.mtp is not None
    theirs = [w for w in model.manifest.weights if w.name not in model.manifest.mtp.own_weights]
    assert (plan["tensors"], plan["weight_bytes"]) == (len(theirs), sum(w.nbytes for w in theirs))
    assert len(theirs) < len(model.manifest.weights)


def test_a_guess_is_never_chosen_by_the_sampler(model: Model) -> None:
    """Each token costs one draw, whether or not it was guessed."""
    sampler = Sampler(1.0, seed=4)
    options = Options(25, 1.0, seed=4, eos=False, speculative=True)
    (found,) = model.complete([prompt(model)], options)
    with model.new_session(1, 200) as session:
        logits = session.prefill(prompt(model)[None])
        tokens = []
        for _ in range(25):
            tokens.append(int(sampler(logits)[0]))
            logits = session.decode(tokens[-1:])
    assert found.token_ids == tokens


def test_the_benchmark_compares_both_ways(model: Model) -> None:
    found = compare(model, prompt(model), 20, rounds=1)
    assert found["equal"]
    assert (found["tokens"], found["plain"]["steps"]) == (20, 19)
    assert found["speculative"]["steps"] <= 19
    assert found["gain"] > 0
