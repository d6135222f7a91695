"""The CPU's tuning script: ``python -m v4c.targets.cpu.tune`` is ``v4c tune --target cpu``.

The search is that of all measured targets (`v4c.targets.schedule_search`); here is what it measures on.
"""

from __future__ import annotations

import sys

from v4c.errors import UnsupportedError

from ..schedule_search import Bench
from ..tuning_database import Machine
from .levels import machine_features
from .target import CPUTarget

COMMAND = (sys.executable, "-m", "v4c.targets.cpu.tune_worker")


def bench(device: CPUTarget, threads: int) -> Bench:
    """This machine, with kernels of `threads` threads; UnsupportedError if it cannot run the target's code."""
    missing = set(device.features) - machine_features()
    if missing:
        raise UnsupportedError(f"target {device.name}: expected a processor with {min(missing)}, found one without")
    return Bench(COMMAND, device.level, Machine.this(threads))


if __name__ == "__main__":
    from v4c.cli.tune import main

    main("cpu")
