"""Target ``cuda`` as a user meets it on a machine without a GPU: what compiles, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from v4c.compiler import _packed, graph, lower, storage_of
from v4c.errors import InputError, UnsupportedError
from v4c.frontend.config import ModelConfig
from v4c.passes.pipeline import PassOptions
from v4c.runtime import cuda, cuda_library, host_memory
from v4c.targets import find
from v4c.targets.cuda import toolchain

needs_nvcc = pytest.mark.skipif(
    toolchain.nvcc() is None, reason="no nvcc: CUDA_HOME, PATH and /usr/local/cuda have none"
)
V4C = Path(sys.executable).with_name("v4c")


def test_unknown_architecture() -> None:
    with pytest.raises(UnsupportedError, match=r"target cuda:sm_75: expected one of sm_80, sm_90a, sm_100a"):
        find("cuda:sm_75")


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_narrow_caches_are_refused(kv: str, tmp_path: Path) -> None:
    command = [V4C, "compile", "--preset", "v4-nano", "--target", "cuda:sm_90a", "--kv", kv, "-o", tmp_path / "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"kv '{kv}': expected f32 for target cuda" in done.stderr
    assert not (tmp_path / "x").exists()


def test_engram_tables_alone_stay_on_the_host(tiny_engram: ModelConfig) -> None:
    storage = storage_of("bf16", "none")
    for disabled in ((), ("hoist-token-work",)):
        options = PassOptions.checked(disabled)
        model, _ = graph(tiny_engram, options, storage, None)
        device = find("cuda:sm_90a")
        _, weights, _ = lower(model, device, storage, options)
        on_host = [w.name for w in _packed(device, weights) if w.on_host]
        assert on_host == [f"model.layers.{i}.engram.embedding.weight" for i in (1, 2)]
        assert not any(w.on_host for w in _packed(find("cpu:generic"), weights))


@pytest.mark.parametrize("free", [1, None])
def test_a_table_that_does_not_fit_in_host_memory(
    free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(shape: tuple[int, ...], dtype: str) -> None:
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(host_memory, "free_memory", lambda: free)
    monkeypatch.setattr(host_memory, "_page_locked", refuse)
    with pytest.raises(InputError) as caught:
        host_memory.HostTable("layers.1.table", tmp_path / "w", 64).load((3, 8), "bfloat16")
    found = "no memory" if free is None else "1 free"
    assert str(caught.value) == f"layers.1.table: expected 48 bytes of host memory for this table, found: {found}"


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "tiny.v4c"
    command = [V4C, "compile", "-m", tiny_checkpoint, "--target", "cuda:sm_90a", "--dtype", "bf16", "-o", path]
    subprocess.run(command, check=True)
    return path


@pytest.mark.slow
@needs_nvcc
def test_an_artifact_holds_machine_code_and_ptx(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["target"]["name"] == "cuda:sm_90a"
    assert manifest["build"]["cuda"]["compiler"].startswith("nvcc ")
    assert manifest["build"]["cuda"]["kernels"] > 50
    library = next(artifact.glob("*.so")).read_bytes()
    assert b"\x50\xed\x55\xba" in library  # a fat binary
    assert b"__global__" not in library  # and no source


@pytest.mark.slow
@needs_nvcc
def test_loading_without_a_driver(artifact: Path) -> None:
    try:
        cuda_library.find_device()
    except UnsupportedError:
        pass
    else:
        pytest.skip("this machine has a GPU")
    done = subprocess.run([V4C, "run", artifact, "--tokens", "1,2"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "target cuda: expected" in done.stderr


@pytest.mark.parametrize(
    ("capability", "fits"), [("80", False), ("89", False), ("90", True), ("100", True), ("120", True)]
)
def test_chips_that_are_too_old(capability: str, fits: bool) -> None:
    script = (
        "from v4c.targets.cuda.simulator.build import load_driver; load_driver()\n"
        "from v4c.runtime.cuda import check_device; check_device('cuda:sm_90a')"
    )
    environment = {**os.environ, "V4C_SIM_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    found = f"{capability[:-1]}.{capability[-1]} (simulated GPU)"
    assert (done.returncode == 0) == fits
    assert fits or f"expected a GPU of compute capability 9.0 or newer, found {found}" in done.stderr


def test_a_driver_without_a_gpu() -> None:
    script = (
        "from v4c.targets.cuda.simulator.build import load_driver; load_driver()\n"
        "from v4c.runtime.cuda_library import find_device; find_device()"
    )
    environment = {**os.environ, "V4C_SIM_DEVICES": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "target cuda: expected an NVIDIA GPU that the driver can use, found CUDA error 100" in done.stderr


def test_a_target_this_runtime_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "find_device", lambda: cuda_library.Device("x", (9, 0), 1))
    with pytest.raises(UnsupportedError, match="expected cuda:sm_ and a number"):
        cuda.check_device("cuda:gfx90a")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from v4c.targets.cuda.architectures import find as architecture

    monkeypatch.setattr(toolchain, "nvcc", lambda: None)
    monkeypatch.setattr(toolchain.nvrtc, "available", lambda: False)
    with pytest.raises(UnsupportedError, match=r"expected nvcc .* or NVRTC .*, found neither"):
        toolchain.compile_source("", architecture("sm_80"))
