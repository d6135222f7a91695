"""The whole model on the simulated GPU: compiled, loaded, prompts in one and many chunks, replayed steps, all
against torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_logits_are_those_of_torch(dtype: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "v4c.targets.cuda.simulator", tiny_checkpoint, tmp_path / "tiny.v4c", "--dtype", dtype,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Two readings decode eight tokens; all but the first of each and the recorded step's first run are replays.
    replays = re.search(r"replayed_steps (\d+)", done.stdout)
    assert replays is not None
    assert int(replays[1]) >= 10
