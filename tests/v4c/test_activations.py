"""``--activations bf16``: bfloat16 matrices with rows rounded to bfloat16, as a user compiles and verifies them."""

from __future__ import annotations

from pathlib import Path

import pytest

import v4c
from tests.v4c.cli_harness import assert_one_line, invoke


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("activations") / "model"
    result = invoke("compile", "-m", tiny_checkpoint, "--dtype", "bf16", "--activations", "bf16", "-o", path)
    assert result.exit_code == 0, result.stderr
    return path


def test_matrices_lie_in_pairs_and_the_rest_as_ever(artifact: Path) -> None:
    manifest = v4c.load(artifact).manifest
    assert (manifest.dtypes.weights, manifest.dtypes.activations) == ("bfloat16", "bfloat16")
    stored = {weight.name: weight.dtype for weight in manifest.weights}
    assert stored["model.embed_tokens.weight"] == "bfloat16"
    assert not [n for n, dtype in stored.items() if dtype == "uint8" and ("norm" in n or "_hc" in n or "sinks" in n)]
    assert [n for n, dtype in stored.items() if dtype == "uint8" and "experts" in n]


def test_it_verifies(artifact: Path, tiny_checkpoint: Path) -> None:
    report = v4c.verify(artifact, tiny_checkpoint, prompt_tokens=60)
    assert report.ok
    assert report.by_typical
    assert report.typical_diff < report.tolerance / 2


def test_another_rounding_is_told_apart(artifact: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference with rows as they are is further away: the rounding is seen, and is the one that is stated."""
    rounded = v4c.verify(artifact, tiny_checkpoint, prompt_tokens=60).typical_diff
    monkeypatch.setattr("v4c.verification_quantised.bfloat16_rows", lambda x: x)
    assert v4c.verify(artifact, tiny_checkpoint, prompt_tokens=60).typical_diff > 2 * rounded


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ((), "expected dtype bf16 and quant none, found f32, none"),
        (("--dtype", "bf16", "--quant", "int8"), "found bf16, int8"),
        (("--dtype", "bf16", "--target", "cuda:sm_90a"), "expected f32 for target cuda"),
    ],
)
def test_refusals(options: tuple[str, ...], fragment: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = ("compile", "-m", tiny_checkpoint, "--activations", "bf16", *options, "-o", tmp_path / "m")
    assert_one_line(invoke(*command), fragment)
    assert not (tmp_path / "m").exists()
