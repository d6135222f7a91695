"""The whole model on the simulated GPU: compiled, loaded, prompts in one and many chunks, replayed steps, all
against torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise_native import initialise_native


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--dtype f32", "--dtype bf16", "--quant int8", "--quant int4", "--quant native"])
def test_logits_are_those_of_torch(
    options: str, tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint
    if options.endswith("native"):
        checkpoint = tmp_path / "published"
        initialise_native(tiny_config, checkpoint, seed=3)
    command = [
        sys.executable, "-m", "v4c.targets.cuda.simulator", checkpoint, tmp_path / "tiny.v4c", *options.split(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Two readings decode eight tokens; all but the first of each and the recorded step's first run are replays.
    replays = re.search(r"replayed_steps (\d+)", done.stdout)
    assert replays is not None
    assert int(replays[1]) >= 10
