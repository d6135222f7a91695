"""``v4c bench`` on the simulated GPU: it counts what the processor's bench counts; times say nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import v4c

SCRIPT = """
import json, sys
from pathlib import Path
from v4c.targets.cuda.simulator.build import compile_simulated, load_driver
load_driver()
import v4c
from v4c import benchmark_limits
from v4c.compiler import compile_for, storage_of
from v4c.errors import UnsupportedError
from v4c.frontend.checkpoint import Checkpoint
from v4c.targets.cuda.architectures import find
from v4c.targets.cuda.target import CUDATarget

checkpoint, path = sys.argv[1], Path(sys.argv[2])
target = CUDATarget(find("sm_90a"), None, compile_simulated)
compile_for(target, Checkpoint.open(checkpoint), path, storage=storage_of("f32", "none"), weights=True, mtp=False)
benchmark_limits._GPU_BYTES, benchmark_limits._ROUNDS = 1 << 20, 1
found = v4c.bench(path, contexts=(24,), prompt_tokens=16, rounds=3)
try:
    v4c.bench(path, profile=True)
except UnsupportedError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_gpu_is_measured_like_a_processor(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, tiny_checkpoint, tmp_path / "gpu.v4c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    v4c.compile(tiny_checkpoint, tmp_path / "cpu.v4c", mtp=False)
    expected = v4c.bench(tmp_path / "cpu.v4c", contexts=(24,), prompt_tokens=16, rounds=1)
    assert "simulated GPU" in found["machine"]
    assert found["stream_bandwidth_gbs"] > 0
    assert found["matrix_peak_gflops"] > 0
    for kind in ("decode", "prefill"):
        (gpu,), (cpu,) = found[kind], expected[kind]
        assert gpu["ms"] > 0
        assert gpu["flops"] == pytest.approx(cpu["flops"], rel=0.02)
        assert gpu["bytes_read"] == pytest.approx(cpu["bytes_read"], rel=0.1)  # panels are padded, rows are not
    assert "expected no profile for a GPU" in found["refused"]
