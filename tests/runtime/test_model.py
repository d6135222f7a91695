"""Loading and generating: results, early errors, threads, and that neither torch nor a compiler is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime import fake_model
from tests.runtime.fake_model import EOS, MAX_CONTEXT, VOCAB, expected_logits
from v4c.errors import InputError
from v4c.runtime import Model, load
from v4c.runtime.library import choose_threads
from v4c.runtime.sampling import Sampler
from v4c.runtime.writer import ArtifactWriter


def greedy(prompt: list[int], count: int, eos: bool) -> list[int]:
    """Continuation of ``prompt`` by the reference."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(expected_logits(np.array(tokens))[-1].argmax()))
        if eos and tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def run(program: str, **environment: str) -> str:
    """Standard output of a fresh interpreter with only these thread settings."""
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**kept, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_properties(model: Model) -> None:
    assert (model.vocab_size, model.max_context, model.eos_token_ids) == (VOCAB, MAX_CONTEXT, (EOS,))
    assert model.config["model_type"] == "deepseek_v4"
    assert model.target.name == "cpu"
    assert model.threads == int(os.environ["TVM_NUM_THREADS"])


@settings(deadline=None, max_examples=40)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
    count=st.integers(0, 30),
    eos=st.booleans(),
)
def test_greedy_generation(model: Model, prompt: list[int], count: int, eos: bool) -> None:
    assert list(model.generate(prompt, max_new_tokens=count, eos=eos)) == greedy(prompt, count, eos)


def test_generation_ends_with_the_stop_token(model: Model) -> None:
    prompts = [[token] for token in range(VOCAB)]
    stopped = [found for prompt in prompts if (found := list(model.generate(prompt, 40)))[-1] == EOS]
    assert any(len(found) < 40 for found in stopped), "the fake model should stop early at least once"
    assert all(EOS not in found[:-1] for found in stopped)


def test_generation_samples_with_its_seed(model: Model) -> None:
    sampler = Sampler(temperature=5.0, top_p=0.9, seed=3)
    tokens = [1, 2]
    while len(tokens) < 12:
        tokens.append(int(sampler(expected_logits(np.array(tokens))[-1:])[0]))
    found = list(model.generate([[1, 2]], 10, temperature=5.0, top_p=0.9, seed=3, eos=False))
    assert found == tokens[2:]


def test_generation_may_fill_the_context(model: Model) -> None:
    prompt = [1] * (MAX_CONTEXT - 3)
    assert len(list(model.generate(prompt, 4, eos=False))) == 4
    assert len(list(model.generate([1, 2], 3, max_context=4, eos=False))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_ids": []}, "token_ids: expected integers, found float64"),
        ({"token_ids": np.zeros(0, dtype=int)}, "token_ids: expected shape [tokens] or [1, tokens], found [0]"),
        ({"token_ids": [[1], [2]]}, "token_ids: expected shape [tokens] or [1, tokens], found [2, 1]"),
        ({"token_ids": [0, VOCAB]}, f"token_ids[1]: expected 0 to {VOCAB - 1}, found {VOCAB}"),
        ({"token_ids": [1], "max_new_tokens": -1}, "max_new_tokens: expected an integer of at least 0, found -1"),
        ({"token_ids": [1], "max_context": MAX_CONTEXT + 1}, "max_context: expected an integer from 1 to"),
        ({"token_ids": [1] * MAX_CONTEXT, "max_new_tokens": 2}, f"token_ids: expected at most {MAX_CONTEXT} tokens"),
        ({"token_ids": [1, 2], "max_new_tokens": 4, "max_context": 4}, "token_ids: expected at most 4 tokens"),
        ({"token_ids": [1], "temperature": -1}, "temperature: expected at least 0, found -1"),
    ],
)
def test_generation_checks_at_once(model: Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        model.generate(**arguments)  # never asked for a token
    assert str(caught.value).startswith(message)


def test_running_needs_neither_torch_nor_a_compiler(artifact: Path) -> None:
    program = f"""
import sys
import v4c
tokens = list(v4c.load({str(artifact)!r}).generate([5, 6, 7], 8, eos=False))
heavy = {{"torch", "tvm", "onnx", "onnxscript", "tokenizers", "transformers"}} & set(sys.modules)
libraries = open("/proc/self/maps").read()
print(tokens, sorted(heavy), "libtvm_compiler" in libraries, "libtorch" in libraries)
import torch, tvm  # both still work afterwards
"""
    assert run(program) == f"{greedy([5, 6, 7], 8, False)} [] False False"


def test_threads_come_from_the_argument_then_the_environment(artifact: Path) -> None:
    program = f"""
import os
from v4c.runtime import load
print(load({str(artifact)!r}, threads=THREADS).threads, sorted(os.sched_getaffinity(0)))
"""
    cpus = sorted(os.sched_getaffinity(0))
    default = program.replace("THREADS", "None")
    assert run(default) == f"{len(cpus)} {cpus}"
    assert run(default, V4C_NUM_THREADS="1", TVM_NUM_THREADS="2") == f"1 {cpus}"
    assert run(default, TVM_NUM_THREADS="1") == f"1 {cpus}"
    assert run(program.replace("THREADS", "1"), V4C_NUM_THREADS="2") == f"1 {cpus}"


def test_threads_are_fixed_for_a_process(artifact: Path, model: Model) -> None:
    assert load(artifact, threads=model.threads).threads == model.threads
    with pytest.raises(InputError, match=f"^threads: expected {model.threads}, which .* found {model.threads + 1}: it"):
        load(artifact, threads=model.threads + 1)
    for wrong in (0, -1, 2.5, True, "x"):
        with pytest.raises(InputError, match="threads: expected a positive integer, found"):
            load(artifact, threads=wrong)  # type: ignore[arg-type]


def test_a_bad_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v4c.runtime.library._chosen", None)
    monkeypatch.setenv("V4C_NUM_THREADS", "many")
    with pytest.raises(InputError, match="V4C_NUM_THREADS: expected a positive integer, found 'many'"):
        choose_threads()


def test_the_tokenizer_of_an_artifact_is_used(library: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{index}": index for index in range(VOCAB)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.save(str(tmp_path / "tokenizer.json"))
    with ArtifactWriter(tmp_path / "a.v4c") as writer:
        writer.write_library(library)
        writer.copy_tokenizer(tmp_path / "tokenizer.json")
        writer.declare_weights(fake_model.WEIGHTS)
        for name, array in fake_model.weights().items():
            writer.write_weight(name, array)
        writer.finish(fake_model.manifest())
    loaded = load(tmp_path / "a.v4c")
    assert loaded.tokenizer.encode("w3 w7").tolist() == [3, 7]
    assert loaded.tokenizer.decode([3, 7]) == "w3 w7"
