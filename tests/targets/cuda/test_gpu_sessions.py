"""Sessions on the simulated GPU: saved, restored and forked, tokens taken back, and two tokens a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.targets.cuda.simulated import report


@pytest.mark.slow
def test_everything_continues_bit_for_bit(engram_artifact: Path, tmp_path: Path) -> None:
    found = report("session_run", engram_artifact, tmp_path)
    assert set(found) == {"saved", "two_models", "taken_back", "speculative"}
    assert set(found["saved"]) >= {"restored", "forked", "empty", "damaged"}
    for name, part in found.items():
        assert all(part.values()), (name, part)
