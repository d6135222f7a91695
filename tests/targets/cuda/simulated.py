"""Commands on the simulated GPU, each in a process of its own, which has the device for good."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def python(*arguments: str | Path, **environment: str) -> str:
    """What ``python -m`` with these arguments prints; it must succeed."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def verified(checkpoint: Path, artifact: Path, *options: str, **environment: str) -> int:
    """Compare with torch: prompts, chunks, steps; compiled first unless it is there. How many steps were replays."""
    printed = python("v4c.targets.cuda.simulator", checkpoint, artifact, *options, **environment)
    replays = re.search(r"replayed_steps (\d+)", printed)
    assert replays is not None
    return int(replays[1])


def report(module: str, *arguments: str | Path, **environment: str) -> Any:
    """The JSON document that a module of this folder prints."""
    return json.loads(python(f"tests.targets.cuda.{module}", *arguments, **environment))
