"""``v4c run``: what is drawn from, where it ends, what is printed, and sessions that are saved and continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.v4c.cli_harness import assert_one_line, invoke
from v4c.runtime import Model, load
from v4c.runtime.generation import Options

PROMPT = "The sea, the sea"


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact)


def run(artifact: Path, *options: str | Path) -> str:
    result = invoke("run", artifact, *options)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def document(artifact: Path, *options: str | Path) -> dict:
    return json.loads(run(artifact, *options, "--json"))


def test_the_document_holds_what_generation_gives(model: Model, tiny_artifact: Path) -> None:
    sampling = ["--temperature", "2", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--seed", "3"]
    found = document(
        tiny_artifact, "--prompt", PROMPT, "--max-new-tokens", "20", *sampling, "--logprobs", "2", "--ignore-eos"
    )
    options = Options(20, 2.0, 0.9, 50, 0.01, 3, eos=False, logprobs=2)
    (expected,) = model.complete(PROMPT, options)
    assert found["token_ids"] == expected.token_ids
    assert found["text"] == expected.text
    assert found["logprobs"] == expected.logprobs
    pairs = [[(top["id"], top["logprob"]) for top in tops] for tops in found["top_logprobs"]]
    assert pairs == [list(tops) for tops in expected.top_logprobs]
    assert (found["finish"], found["prompt_tokens"], found["steps"]) == ("length", len(PROMPT), 19)
    assert set(found["seconds"]) == {"prefill", "decode"}


def test_a_stop_string_ends_the_text(model: Model, tiny_artifact: Path) -> None:
    (whole,) = model.complete(PROMPT, Options(40, eos=False))
    readable = next(c for c in whole.text[8:] if c.isascii() and c.isprintable() and not c.isspace())
    found = document(tiny_artifact, "--prompt", PROMPT, "--max-new-tokens", "40", "--ignore-eos", "--stop", readable)
    assert (found["text"], found["finish"]) == (whole.text[: whole.text.index(readable)], "stop")
    shown = run(tiny_artifact, "--prompt", PROMPT, "--max-new-tokens", "40", "--ignore-eos", "--stop", readable)
    assert shown == found["text"] + "\n"


def test_log_probabilities_stand_on_a_line_per_token(tiny_artifact: Path) -> None:
    lines = run(tiny_artifact, "--tokens", "5,6", "--max-new-tokens", "4", "--ignore-eos", "--logprobs", "2")
    rows = [line.split("\t") for line in lines.splitlines()]
    found = document(tiny_artifact, "--tokens", "5,6", "--max-new-tokens", "4", "--ignore-eos", "--logprobs", "2")
    assert [int(row[0]) for row in rows] == found["token_ids"]
    assert [float(row[1]) for row in rows] == pytest.approx(found["logprobs"], abs=1e-4)
    assert all(row[2].startswith(f"{row[0]}:") for row in rows), "greedy: the token is the likeliest"


def test_a_prompt_comes_from_a_file(tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    options = ["--max-new-tokens", "5", "--ignore-eos"]
    given = document(tiny_artifact, "--prompt", PROMPT, *options)["token_ids"]
    assert document(tiny_artifact, "--prompt-file", tmp_path / "prompt.txt", *options)["token_ids"] == given
    (tmp_path / "latin").write_bytes(b"\xff")
    for name, found in (("latin", "other bytes"), ("none", "No such file")):
        assert_one_line(invoke("run", tiny_artifact, "--prompt-file", tmp_path / name), str(tmp_path / name), found)


def test_a_saved_session_goes_on_where_it_ended(tiny_artifact: Path, tmp_path: Path) -> None:
    options = ["--ignore-eos", "--max-new-tokens"]
    whole = document(tiny_artifact, "--prompt", PROMPT, *options, "12")["token_ids"]
    first = document(tiny_artifact, "--prompt", PROMPT, *options, "5", "--save-session", tmp_path / "a")["token_ids"]
    middle = document(tiny_artifact, "--session", tmp_path / "a", *options, "4", "--save-session", tmp_path / "a")
    last = document(tiny_artifact, "--session", tmp_path / "a", *options, "3")["token_ids"]
    assert [*first, *middle["token_ids"], *last] == whole
    assert middle["prompt_tokens"] == 1


def test_a_long_prompt_is_paid_for_once(tiny_artifact: Path, tmp_path: Path) -> None:
    options = ["--ignore-eos", "--max-new-tokens", "6"]
    run(tiny_artifact, "--prompt", PROMPT, "--max-new-tokens", "0", "--save-session", tmp_path / "s")
    more = document(tiny_artifact, "--session", tmp_path / "s", "--prompt", " and", *options)
    assert more["token_ids"] == document(tiny_artifact, "--prompt", PROMPT + " and", *options)["token_ids"]
    assert more["prompt_tokens"] == 1 + len(" and")


def test_sessions_are_refused_on_one_line(tiny_artifact: Path, tmp_path: Path) -> None:
    saved = tmp_path / "s"
    run(tiny_artifact, "--tokens", "5,6,7,8,9", "--max-new-tokens", "0", "--save-session", saved)
    assert_one_line(invoke("run", tiny_artifact, "--session", saved, "--max-context", "3"), "max_context", "4")
    assert_one_line(
        invoke("run", tiny_artifact, "--session", saved, "--max-context", "8", "--max-new-tokens", "9"), "4 read"
    )
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    assert_one_line(invoke("run", tiny_artifact, "--session", saved), str(saved), "unaltered")
    assert_one_line(invoke("run", tiny_artifact, "--session", tmp_path / "none"), str(tmp_path / "none"))
    missing = invoke("run", tiny_artifact, "--tokens", "5", "--save-session", tmp_path / "no" / "s")
    assert_one_line(missing, str(tmp_path / "no"), "existing folder")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ([], ("--prompt", "--tokens", "--session")),
        (["--prompt", "a", "--tokens", "5"], ("--prompt", "--tokens")),
        (["--prompt", ""], ("--prompt", "at least one token")),
        (["--tokens", "5", "--top-k", "-1"], ("top_k",)),
        (["--tokens", "5", "--min-p", "2"], ("min_p",)),
        (["--tokens", "5", "--logprobs", "-1"], ("logprobs",)),
        (["--tokens", "5", "--stop", ""], ("stop",)),
        (["--tokens", "5", "--speculative"], ("speculative", "multi-token-prediction layer, found none")),
    ],
)
def test_bad_options_are_refused(options: list[str], fragments: tuple[str, ...], tiny_artifact: Path) -> None:
    assert_one_line(invoke("run", tiny_artifact, *options), *fragments)
