"""Where kernel tests run: on the simulated GPU, or with ``pytest -m gpu`` on a real one - the same tests."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``-m gpu`` asks for a real device: the tests of kernels and of the whole model are then GPU tests."""
    if (config.option.markexpr or "").strip() != "gpu":
        return
    os.environ["V4C_TEST_GPU"] = "1"
    for item in items:
        if item.path.name.startswith("test_kernel_") and item.path.parent.name == "cuda":
            item.add_marker(pytest.mark.gpu)
