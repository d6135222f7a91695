"""Every pass on whole models of random configurations: the same logits with it as without, and it does something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.passes.whole_graph import Traced
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import RandomCheckpoint
from v4c.passes.pipeline import ONNX_PASSES

NAMES = [p.pass_name for p in ONNX_PASSES]
FOR_OTHER_GRAPHS = {"fuse-rms-norm", "fuse-rope", "fuse-router", "fuse-experts"}
"""Passes whose patterns the exporter never leaves; graphs handed in have them."""


@pytest.fixture(scope="module", params=["random", "engram"])
def traced(request: pytest.FixtureRequest, tiny_engram: ModelConfig) -> Traced:
    if request.param == "engram":
        return Traced.of(RandomCheckpoint(tiny_engram, seed=5))
    return Traced.random(int(np.random.default_rng().integers(2**16)))


@pytest.fixture(scope="module")
def plain(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Logits of the graph as it was traced."""
    model, _ = traced.passed(NAMES)
    return traced.logits(model, tmp_path_factory.mktemp("plain"), seed=3)


def check(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(b).max(initial=0))))


def test_all_passes(traced: Traced, plain: list[np.ndarray], tmp_path: Path) -> None:
    model, reports = traced.passed([])
    check(traced.logits(model, tmp_path, seed=3), plain)
    idle = {r.name for r in reports if not r.rewritten} - FOR_OTHER_GRAPHS
    assert not idle, "passes that found nothing to do"


@pytest.mark.parametrize("name", NAMES)
def test_without_one_pass(traced: Traced, plain: list[np.ndarray], tmp_path: Path, name: str) -> None:
    model, reports = traced.passed([name])
    assert name not in {r.name for r in reports}
    check(traced.logits(model, tmp_path, seed=3), plain)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FOR_OTHER_GRAPHS])
def test_one_pass_alone(traced: Traced, plain: list[np.ndarray], tmp_path: Path, name: str) -> None:
    model, _ = traced.passed([n for n in NAMES if n != name])
    check(traced.logits(model, tmp_path, seed=3), plain)


def test_weights_are_read_under_their_own_names_afterwards(traced: Traced) -> None:
    model, _ = traced.passed([])
    names = {str(v.name) for v in traced.model().graph.inputs}
    assert {str(v.name) for v in model.graph.inputs} == names
    assert [v.name for v in model.graph.outputs] == [v.name for v in traced.model().graph.outputs]
