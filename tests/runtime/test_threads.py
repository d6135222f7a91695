"""Threads of the compiled module: how many there are beside those of others, and that they change no result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CPUS = min(2, len(os.sched_getaffinity(0)))

PROGRAM = """
import hashlib, os, sys
import numpy as np
import v4c
{before}
def threads():
    return len(os.listdir("/proc/self/task"))
others = threads()
model = v4c.load({artifact!r}, threads={threads})
ids = np.random.default_rng(0).integers(0, model.vocab_size, (2, 90))
digest = hashlib.sha256()
with model.new_session(batch=2, max_context=128) as session:
    digest.update(session.prefill(ids).tobytes())
    for step in range(20):
        digest.update(session.decode(ids[:, step]).tobytes())
print(threads() - others, digest.hexdigest())
"""


def run(artifact: Path, threads: int, before: str = "") -> tuple[int, str]:
    """Threads that came with running the model, and a digest of its logits."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    program = PROGRAM.format(artifact=str(artifact), threads=threads, before=before)
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    more, digest = result.stdout.split()
    return int(more), digest


def test_a_model_adds_its_threads_but_one(tiny_artifact: Path) -> None:
    """The calling thread is one of them, whatever number TVM, OpenMP or a BLAS would choose by themselves."""
    for threads in range(1, CPUS + 1):
        assert run(tiny_artifact, threads)[0] == threads - 1


def test_others_neither_add_to_them_nor_change_results(tiny_artifact: Path) -> None:
    torch = "import torch; torch.set_num_threads(2); torch.ones(512, 512) @ torch.ones(512, 512)"
    numpy = "np.ones((512, 512)) @ np.ones((512, 512))"
    alone = run(tiny_artifact, CPUS)
    assert run(tiny_artifact, CPUS, before=torch) == alone
    assert run(tiny_artifact, CPUS, before=numpy) == alone


def test_a_number_of_threads_gives_the_same_bits_every_time(tiny_artifact: Path) -> None:
    digests = {run(tiny_artifact, CPUS)[1] for _ in range(3)}
    assert len(digests) == 1
