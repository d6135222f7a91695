"""The GPU's tuning script: ``python -m v4c.targets.cuda.tune`` is ``v4c tune --target cuda``.

The search is that of all measured targets (`v4c.targets.schedule_search`); here is what it measures on.

    v4c tune --preset flash-slice --target cuda --dtype bf16 -o db.json
    v4c compile --preset flash-slice --target cuda --dtype bf16 --tuning db.json -o slice.v4c
"""

from __future__ import annotations

import sys

from v4c.runtime import cuda_library

from ..schedule_search import Bench
from ..tuning_database import Machine
from .target import CUDATarget

COMMAND = (sys.executable, "-m", "v4c.targets.cuda.tune_worker")


def bench(device: CUDATarget) -> Bench:
    """This machine's GPU; UnsupportedError where there is none."""
    gpu = cuda_library.find_device()
    return Bench(COMMAND, device.architecture.name, Machine(gpu.name, gpu.processors, 1))


if __name__ == "__main__":
    from v4c.cli.tune import main

    main("cuda")
