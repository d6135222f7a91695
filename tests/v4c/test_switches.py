"""Choices of the import and phases over the Relax module: switched off, a random model gives the same logits."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

import v4c
from tests.parity.reference import StateDictSource, random_hf_config, random_hf_model
from v4c.passes.pipeline import ONNX_PASSES, OPTIONAL

SWITCHES = [n for n in OPTIONAL if n not in {p.pass_name for p in ONNX_PASSES}]


@pytest.fixture(scope="module")
def source() -> StateDictSource:
    seed = int(np.random.default_rng().integers(2**16))
    return StateDictSource.of(random_hf_model(random_hf_config(seed), seed))


def logits(source: StateDictSource, path: Path, disabled: Collection[str]) -> np.ndarray:
    """Of a prompt and of single tokens after it, one row (whose decode step may be a function of its own)."""
    v4c.compile(source, path, disable_passes=disabled)
    ids = np.random.default_rng(5).integers(0, source.config.vocab_size, (1, 90))
    with v4c.load(path, threads=2).new_session(max_context=128) as session:
        found = [session.prefill(ids[:, :80], all_logits=True)[0]]
        found += [session.decode(ids[:, i]) for i in range(80, 90)]
    return np.concatenate(found)


@pytest.fixture(scope="module")
def expected(source: StateDictSource, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return logits(source, tmp_path_factory.mktemp("all") / "m.v4c", [])


def check(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


def test_all_switched_off(source: StateDictSource, expected: np.ndarray, tmp_path: Path) -> None:
    check(logits(source, tmp_path / "m.v4c", SWITCHES), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHES)
def test_one_switched_off(source: StateDictSource, expected: np.ndarray, tmp_path: Path, name: str) -> None:
    check(logits(source, tmp_path / "m.v4c", [name]), expected)
