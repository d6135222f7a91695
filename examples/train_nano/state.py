"""Saving a run so that it continues bit for bit: safetensors and JSON, written beside and renamed when complete."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from v4c.errors import CheckpointError

WEIGHTS, MOMENTS, RUN = "weights.safetensors", "moments.safetensors", "run.json"


def save_state(folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], run: dict[str, Any]) -> None:
    """Replace the state in `folder`; a run that is stopped meanwhile finds the old one or the new one.

    Args:
        folder: whose parent exists.
        weights: every tensor of the model.
        moments: of the optimisers.
        run: step, settings and log.
    """
    building = folder.parent / f".{folder.name}.{secrets.token_hex(6)}"
    old = folder.parent / f".{folder.name}.old"
    building.mkdir()
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, building / WEIGHTS)
        save_file({name: tensor.detach().contiguous() for name, tensor in moments.items()}, building / MOMENTS)
        (building / RUN).write_text(json.dumps(run) + "\n", encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The saved (weights, moments, run).

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    old = folder.parent / f".{folder.name}.old"
    if not folder.exists() and old.exists():  # stopped between two renames
        os.replace(old, folder)
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        # Copied, for a file's tensors lie unaligned, and sums over unaligned memory round otherwise.
        weights, moments = (
            {name: tensor.clone() for name, tensor in load_file(folder / file).items()} for file in (WEIGHTS, MOMENTS)
        )
        return weights, moments, run
    except (OSError, ValueError, SafetensorError) as failure:
        raise CheckpointError(f"{folder}: expected the saved state of a run, found {failure}") from failure
