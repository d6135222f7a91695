"""Compiling with quantised weights, as a user does it, and how the result is verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import v4c
from tests.targets.quantised_reference import rounded
from v4c.frontend.checkpoint import Checkpoint
from v4c.runtime.session import Session
from v4c.verification_quantised import QuantisedProducts, rounded_rows


@pytest.fixture(scope="module", params=["int8", "int4"])
def artifact(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantised") / request.param
    v4c.compile(tiny_checkpoint, path, quant=request.param)
    return path


def test_products_are_stored_in_few_bits_and_the_rest_is_not(artifact: Path, tiny_artifact: Path) -> None:
    manifest, plain = v4c.load(artifact).manifest, v4c.load(tiny_artifact).manifest
    assert manifest.dtypes.weights == artifact.name
    stored = {weight.name: weight.dtype for weight in manifest.weights}
    assert {"uint8", "float32", "int64"} == set(stored.values())
    assert stored["model.embed_tokens.weight"] == "float32"
    assert not [n for n, dtype in stored.items() if dtype == "uint8" and ("norm" in n or "_hc" in n or "sinks" in n)]
    assert [n for n, dtype in stored.items() if dtype == "uint8" and "experts" in n]
    size = {"int8": 0.5, "int4": 0.4}[artifact.name]  # matrices of the tiny model are padded to groups and panels
    assert _bytes(artifact) < size * _bytes(tiny_artifact)
    assert {w.name for w in plain.weights} == set(stored)


def _bytes(artifact: Path) -> int:
    return sum(file.stat().st_size for file in artifact.glob("weights*"))


def test_it_verifies(artifact: Path, tiny_checkpoint: Path) -> None:
    report = v4c.verify(artifact, tiny_checkpoint, prompt_tokens=60)
    assert report.ok
    assert report.by_typical
    assert report.typical_diff <= report.max_abs_diff
    assert report.typical_diff < report.tolerance / 4


@pytest.mark.parametrize("entry", ["prefill", "prefill_all", "decode_one"])
def test_a_logit_that_is_no_number_fails(
    entry: str, artifact: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Session._run

    def wrong(session: Session, name: str, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        logits = run(session, name, tokens, lengths)
        if name == entry:
            logits[..., 3] = np.nan
        return logits

    monkeypatch.setattr(Session, "_run", wrong)
    assert not v4c.verify(artifact, tiny_checkpoint, prompt_tokens=20, decode_tokens=5).ok


def test_another_model_fails(artifact: Path, tiny_checkpoint: Path) -> None:
    class Other:
        """The checkpoint with another output projection."""

        config = Checkpoint.open(tiny_checkpoint).config

        def load(self, name: str, dtype: str | None = None) -> np.ndarray:
            array = Checkpoint.open(tiny_checkpoint).load(name, dtype)
            return np.roll(array, 1, axis=0) if name == "lm_head.weight" else array

    assert not v4c.verify(artifact, Other(), prompt_tokens=20, decode_tokens=5).ok


@given(st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_rows_are_rounded_as_documented(rows: int, k: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)
    values, slack = rounded(x)
    found = rounded_rows(torch.from_numpy(x)).numpy()
    assert np.all(np.abs(found - values) <= slack + 1e-6 * np.abs(x).max())


def test_only_the_given_weights_take_rounded_rows() -> None:
    x, one, other = torch.randn(3, 40), torch.randn(8, 40), torch.randn(8, 40)
    with QuantisedProducts([one]):
        rounded_product, plain = F.linear(x, one), F.linear(x, other)
        part = torch.matmul(x, one[2:5].T)
    torch.testing.assert_close(rounded_product, rounded_rows(x) @ one.T)
    torch.testing.assert_close(part, rounded_product[:, 2:5])
    torch.testing.assert_close(plain, x @ other.T)
    assert not torch.allclose(rounded_product, x @ one.T, atol=1e-5)


def test_an_unknown_quantisation_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(v4c.UnsupportedError, match=r"quant 'int3': expected one of none, int8, int4, native"):
        v4c.compile(tiny_checkpoint, tmp_path / "x", quant="int3")
    assert not (tmp_path / "x").exists()
