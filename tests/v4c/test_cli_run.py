"""``v4c run`` and ``v4c verify`` on the tiny model, as a user runs them and with everything a user can get wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.v4c.cli_harness import assert_one_line, invoke, shell
from v4c.cli.run import parse_tokens, speed
from v4c.errors import InputError
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import initialise
from v4c.runtime.artifact import read_manifest
from v4c.runtime.model import load


@pytest.fixture(scope="module")
def wordless(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifact without its tokenizer."""
    path = tmp_path_factory.mktemp("wordless") / "tiny.v4c"
    shutil.copytree(tiny_artifact, path)
    manifest = read_manifest(path)
    files = {name: stored for name, stored in manifest.files.items() if name != manifest.tokenizer}
    (path / "manifest.json").write_text(replace(manifest, tokenizer=None, files=files).to_json())
    (path / "tokenizer.json").unlink()
    return path


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1))
def test_parse_tokens_reads_what_join_writes(ids: list[int]) -> None:
    assert parse_tokens(",".join(map(str, ids))) == parse_tokens(" , ".join(map(str, ids))) == ids


@pytest.mark.parametrize(
    "text", ["", ",", "1,,2", "1,2,", "-1", "1.5", "1e3", "0x1", "one", "²", "1 2", f"{2**63}", "9" * 5000]
)
def test_parse_tokens_refuses(text: str) -> None:
    with pytest.raises(InputError, match="--tokens: expected token ids"):
        parse_tokens(text)


def test_speed_counts_the_prompt_and_the_tokens_after_the_first() -> None:
    assert speed(10, 1.0, [3.0, 3.5, 4.0, 4.5]) == "prefill 10 tokens, 5.0 tokens/s; decode 3 tokens, 2.0 tokens/s"
    assert speed(10, 1.0, [3.0]) == "prefill 10 tokens, 5.0 tokens/s"
    assert speed(10, 1.0, []) == "no tokens"


def test_run_prints_token_ids(wordless: Path) -> None:
    result = shell(["run", wordless, "--tokens", "5,6,7", "--max-new-tokens", "9", "--threads", "1"])
    assert result.returncode == 0, result.stderr
    expected = list(load(wordless).generate([5, 6, 7], 9))
    assert result.stdout == ",".join(map(str, expected)) + "\n"
    assert re.fullmatch(r"prefill 3 tokens, [\d.]+ tokens/s; decode 8 tokens, [\d.]+ tokens/s\n", result.stderr)


def test_run_streams_text(tiny_artifact: Path) -> None:
    model = load(tiny_artifact)
    prompt = "héllo"
    ids = [byte + 2 for byte in prompt.encode()]
    expected = model.tokenizer.decode(list(model.generate(ids, 12)))
    result = invoke("run", tiny_artifact, "--prompt", prompt, "--max-new-tokens", "12")
    assert (result.exit_code, result.stdout) == (0, expected + "\n")
    assert result.stderr.startswith("prefill 6 tokens, ")
    tokens = invoke("run", tiny_artifact, "--tokens", ",".join(map(str, ids)), "--max-new-tokens", "12")
    assert tokens.stdout == result.stdout


def test_run_samples_by_seed(wordless: Path) -> None:
    def text(*options: str) -> str:
        result = invoke("run", wordless, "--tokens", "9", "--max-new-tokens", "20", "--temperature", "2", *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    greedy = invoke("run", wordless, "--tokens", "9", "--max-new-tokens", "20").stdout
    assert text("--seed", "1", "--top-p", "1e-9") == greedy != text("--seed", "1")


def test_run_needs_no_torch_and_no_compiler(tiny_artifact: Path) -> None:
    probe = (
        "import json, sys\nfrom v4c.cli import main\n"
        f"try:\n    main(['run', {str(tiny_artifact)!r}, '--prompt', 'hi', '--max-new-tokens', '3'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(json.dumps([name for name in ('torch', 'tvm', 'onnx', 'onnxscript') if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--tokens", "1,x"], ("--tokens", "'x'")),
        (["--tokens", "3,320"], ("token_ids[1]", "319", "320")),
        (["--tokens", "1,2,3", "--max-context", "8", "--max-new-tokens", "7"], ("max_context", "8")),
        (["--tokens", "1", "--max-context", "4097"], ("max_context", "4096")),
        (["--tokens", "1", "--max-new-tokens", "5000"], ("4096",)),
        (["--tokens", "1", "--max-new-tokens", "-1"], ("max_new_tokens",)),
        (["--tokens", "1", "--temperature", "-1"], ("temperature",)),
        (["--tokens", "1", "--temperature", "nan"], ("temperature",)),
        (["--tokens", "1", "--top-p", "0"], ("top_p",)),
        (["--tokens", "1", "--seed", "-5"], ("seed",)),
        (["--tokens", "1", "--threads", "0"], ("threads",)),
        (["--prompt", "hi"], ("tokenizer",)),
    ],
)
def test_run_refuses(options: list[str], fragments: tuple[str, ...], wordless: Path) -> None:
    assert_one_line(invoke("run", wordless, *options), *fragments)


def test_the_last_position_of_the_context_can_be_used(wordless: Path) -> None:
    # 3 tokens and 5 new ones of which the last is not read: 7 positions.
    result = invoke("run", wordless, "--tokens", "1,2,3", "--max-context", "7", "--max-new-tokens", "5")
    assert (result.exit_code, result.stdout.count(",")) == (0, 4)


def flip_byte(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = next(folder.glob(name))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return change


def truncate(folder: Path) -> None:
    path = folder / "weights-00001.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def other_format(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "library": (flip_byte("model-*.so"), ("model-", "SHA-256")),
    "weights": (flip_byte("weights-*.safetensors"), ("weights-00001.safetensors", "SHA-256")),
    "tokenizer": (flip_byte("tokenizer.json"), ("tokenizer.json", "SHA-256")),
    "manifest": (flip_byte("manifest.json"), ("manifest.json",)),
    "format": (other_format, ("manifest.json", "format 99")),
    "truncated": (truncate, ("weights-00001.safetensors", "bytes")),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), ("manifest.json",)),
    "missing": (shutil.rmtree, ("manifest.json",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_artifacts_are_one_line(
    damage: str, tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a.v4c"
    shutil.copytree(tiny_artifact, folder)
    change, fragments = DAMAGES[damage]
    change(folder)
    assert_one_line(invoke("run", folder, "--tokens", "1"), str(folder), *fragments)
    assert_one_line(invoke("verify", folder, "-m", tiny_checkpoint, "--json"), str(folder), *fragments)


def test_verify_as_a_process(tiny_artifact: Path, tiny_checkpoint: Path) -> None:
    result = shell(["verify", tiny_artifact, "-m", tiny_checkpoint, "--json"])
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert list(document) == ["max_abs_diff", "typical_diff", "argmax_agreement", "tolerance", "ok"]
    assert 0 < document["max_abs_diff"] < document["tolerance"] < 0.1
    assert document["argmax_agreement"] > 0.99
    assert document["ok"] is True


def test_verify_fails_on_other_weights(tiny_artifact: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    initialise(tiny_config, tmp_path / "other", seed=8)
    result = invoke("verify", tiny_artifact, "-m", tmp_path / "other")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == "FAILED"
    as_json = invoke("verify", tiny_artifact, "-m", tmp_path / "other", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["ok"] is False


def test_verify_refuses_another_model(tiny_artifact: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    initialise(replace(tiny_config, hc_sinkhorn_iters=19), tmp_path / "other", seed=7)
    assert_one_line(
        invoke("verify", tiny_artifact, "-m", tmp_path / "other"),
        "hc_sinkhorn_iters",
        "expected the artifact's 20",
        "19",
    )
    assert_one_line(invoke("verify", tiny_artifact, "-m", tmp_path / "none"), str(tmp_path / "none"))
