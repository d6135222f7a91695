"""Where kernel tests run: on the simulated GPU, or with ``pytest -m gpu`` on a real one - the same tests. A model with
Engram and an MTP layer for the simulated one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.made_once import made_once
from tests.targets.cuda.simulated import verified
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import initialise
from v4c.frontend.presets import with_engram


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``-m gpu`` asks for a real device: the tests of kernels and of the whole model are then GPU tests."""
    if (config.option.markexpr or "").strip() != "gpu":
        return
    os.environ["V4C_TEST_GPU"] = "1"
    for item in items:
        if item.path.name.startswith("test_kernel_") and item.path.parent.name == "cuda":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def engram_checkpoint(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engram on the second and third layer, with tables of rows of 8 numbers."""
    folder = tmp_path_factory.mktemp("engram") / "checkpoint"
    config = with_engram(tiny_config, heads_per_ngram=2, embed_dim=8)
    initialise(replace(config, num_nextn_predict_layers=1), folder, seed=5)
    return folder


@pytest.fixture(scope="session")
def engram_artifact(engram_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`engram_checkpoint` in float32 for the simulated GPU, by its command; workers of one run share it."""
    return made_once(tmp_path_factory, "engram.v4c", lambda path: verified(engram_checkpoint, path))
