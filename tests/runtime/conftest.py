"""One small artifact, compiled once per run of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime import fake_model
from v4c.runtime import Model, load


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library of the fake model."""
    return fake_model.compile_library(tmp_path_factory.mktemp("library") / "m.so")


@pytest.fixture(scope="session")
def artifact(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the fake model; tests that damage one write their own."""
    return fake_model.write(tmp_path_factory.mktemp("artifact") / "fake.v4c", library)


@pytest.fixture(scope="session")
def model(artifact: Path) -> Model:
    """The fake model, loaded."""
    return load(artifact)
