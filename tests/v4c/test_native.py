"""Artifacts that keep a published checkpoint's FP8 and FP4 weights, and other storage of the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import v4c
from tests.v4c.cli_harness import shell
from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise_native import initialise_native
from v4c.passes.relax.layouts import part_names
from v4c.targets.cpu.kernels.native_packing import BLOCK_BYTES


@pytest.fixture(scope="module")
def checkpoint(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "tiny"
    initialise_native(tiny_config, folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "tiny.v4c"
    result = shell(["compile", "-m", checkpoint, "--quant", "native", "-o", path])
    assert result.returncode == 0, result.stderr
    return path


def test_weights_stay_as_the_checkpoint_has_them(artifact: Path, checkpoint: Path) -> None:
    source = Checkpoint.open(checkpoint)
    manifest = v4c.load(artifact).manifest
    assert manifest.dtypes.weights == "native"
    blocks = {"fp8": BLOCK_BYTES["fp8"], "fp4": BLOCK_BYTES["fp4"]}
    kept = set()
    for weight in manifest.weights:
        forms = {source.source_dtype(name) for name in part_names(weight.name)}
        assert len(forms) == 1, weight.name  # merged with its like only
        form = forms.pop()
        if form in blocks:
            assert (weight.dtype, weight.shape[-1]) == ("uint8", blocks[form]), weight.name
            kept.add(form)
        elif weight.name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert weight.dtype == "bfloat16"
    assert kept == {"fp8", "fp4"}


def test_it_verifies(artifact: Path, checkpoint: Path) -> None:
    report = v4c.verify(artifact, checkpoint)
    assert report.ok
    assert report.by_typical
    assert report.typical_diff < report.tolerance / 3


def test_other_weights_fail(artifact: Path, checkpoint: Path) -> None:
    class Other:
        """The checkpoint with the experts of a layer in another order."""

        config = Checkpoint.open(checkpoint).config

        def load(self, name: str, dtype: str | None = None) -> np.ndarray:
            array = Checkpoint.open(checkpoint).load(name, dtype)
            return np.roll(array, 1, axis=0) if name.endswith("2.mlp.experts.down_proj") else array

    assert not v4c.verify(artifact, Other(), prompt_tokens=30, decode_tokens=5).ok


def test_all_readings_agree(artifact: Path) -> None:
    model = v4c.load(artifact)
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (1, 140))
    with model.new_session(max_context=140) as session:
        whole = session.prefill(tokens, all_logits=True, chunk=140)[0]
        session.reset()
        cut = session.prefill(tokens, all_logits=True, chunk=9)[0]
        session.reset()
        steps = np.stack([session.decode(t)[0] for t in tokens[0, :, None]])
    for other in (cut, steps):
        assert np.median(np.abs(other - whole).max(-1)) < 2e-3


@pytest.mark.parametrize(
    "options",
    [
        {"quant": "int8"},
        {"quant": "int4", "kv": "fp8"},
        {"dtype": "bf16"},
        {"quant": "native", "kv": "fp8"},
        {"quant": "native", "target": "cpu:x86-64-v3"},
        {"quant": "native", "target": "cpu:x86-64-v2"},
    ],
    ids=lambda options: "-".join(options.values()),
)
@pytest.mark.slow
def test_the_same_checkpoint_stored_otherwise_verifies(
    options: dict[str, str], checkpoint: Path, tmp_path: Path
) -> None:
    v4c.compile(checkpoint, tmp_path / "other", **options)
    assert v4c.verify(tmp_path / "other", checkpoint, prompt_tokens=140).ok


def test_a_dry_run_of_a_preset_counts_the_published_formats() -> None:
    report = v4c.compile(_preset("flash-slice"), "unused", quant="native", weights=False, dry_run=True)
    assert isinstance(report, dict)
    from v4c.frontend.estimate import weight_bytes

    # Routers and norms are float32 here and bfloat16 there; blocks have scales for every output.
    assert 1 < report["weight_bytes"] / weight_bytes(_preset("flash-slice")) < 1.03


def _preset(name: str) -> ModelConfig:
    from v4c.frontend.presets import preset

    return preset(name)


def test_a_checkpoint_of_floats_stays_one(tiny_checkpoint: Path) -> None:
    result = shell(["compile", "-m", tiny_checkpoint, "--quant", "native", "--dry-run", "-o", "unused"])
    assert result.returncode == 0, result.stderr
    plain = shell(["compile", "-m", tiny_checkpoint, "--dry-run", "-o", "unused"])
    assert json.loads(result.stdout)["weight_bytes"] == json.loads(plain.stdout)["weight_bytes"]
