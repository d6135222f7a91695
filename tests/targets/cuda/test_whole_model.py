"""The whole model on the simulated GPU: compiled, loaded, prompts in one and many chunks, replayed steps, all
against torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.targets.cuda.simulated import verified


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_logits_are_those_of_torch(dtype: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    # Two readings decode eight tokens; all but the first of each and the recorded step's first run are replays.
    assert verified(tiny_checkpoint, tmp_path / "tiny.v4c", dtype) >= 10
