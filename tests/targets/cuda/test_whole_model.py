"""The whole model on the simulated GPU: compiled, loaded, prompts in one and many chunks, replayed steps, all
against torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.targets.cuda.simulated import verified
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise_native import initialise_native

OPTIONS = ["--dtype f32", "--dtype bf16", "--quant int8", "--quant int4", "--quant native"]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_logits_are_those_of_torch(
    options: str, tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint
    if options.endswith("native"):
        checkpoint = tmp_path / "published"
        initialise_native(tiny_config, checkpoint, seed=3)
    # Two readings decode eight tokens; all but the first of each and the recorded step's first run are replays.
    assert verified(checkpoint, tmp_path / "tiny.v4c", *options.split()) >= 10
