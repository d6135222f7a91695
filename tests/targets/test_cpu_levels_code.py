"""What code a level's library holds: disassembled, it has the registers of that level and none of a higher one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import v4c
from v4c.runtime.artifact import cpu_features
from v4c.targets.cpu.levels import LEVELS

AVX512 = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b")
"""512-bit registers, the upper half of the register file, masks."""
AVX = re.compile(r"%ymm|\tv[a-z0-9]+ ")


def code(artifact: Path) -> str:
    """The library's instructions, in AT&T syntax."""
    library = next(artifact.glob("*.so"))
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module", params=["x86-64-v3", pytest.param("x86-64-v4", marks=pytest.mark.slow)])
def artifact(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("levels") / request.param
    v4c.compile(tiny_checkpoint, path, target=f"cpu:{request.param}")
    return path


def test_code_keeps_to_its_level(artifact: Path) -> None:
    text = code(artifact)
    assert len(text) > 100_000
    assert AVX.search(text)
    found = AVX512.search(text)
    if artifact.name == "x86-64-v4":
        assert found, "the pattern finds no AVX-512 where there is some"
    else:
        assert not found, text[max(0, found.start() - 200) : found.end()]


def test_it_runs_here_if_this_machine_has_its_features(artifact: Path, tiny_checkpoint: Path) -> None:
    missing = [feature for feature in LEVELS[artifact.name] if feature not in cpu_features()]
    if missing:
        with pytest.raises(v4c.ArtifactError, match=f"compiled for a CPU with {', '.join(missing)}"):
            v4c.load(artifact)
    else:
        assert v4c.verify(artifact, tiny_checkpoint, prompt_tokens=40, decode_tokens=4).ok


def test_a_feature_that_is_missing_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = LEVELS[artifact.name][-1]
    monkeypatch.setattr("v4c.runtime.artifact.cpu_features", lambda: cpu_features() - {lacks})
    with pytest.raises(v4c.ArtifactError, match=rf"compiled for a CPU with {lacks}, which this one lacks"):
        v4c.load(artifact)


@pytest.mark.parametrize("line", ["vaddps %zmm1,%zmm2,%zmm3", "vmovups %ymm17,(%rax)", "vpaddd %xmm1,%xmm2,%xmm3{%k1}"])
def test_the_pattern_finds_avx512(line: str) -> None:
    assert AVX512.search(line)
    assert not AVX512.search("vfmadd231ps (%rax),%ymm15,%ymm1")


@pytest.mark.slow
def test_the_baseline_has_no_avx(tiny_checkpoint: Path, tmp_path: Path) -> None:
    v4c.compile(tiny_checkpoint, tmp_path / "baseline", target="cpu:x86-64")
    found = AVX.search(code(tmp_path / "baseline"))
    assert not found
    assert v4c.verify(tmp_path / "baseline", tiny_checkpoint, prompt_tokens=40, decode_tokens=4).ok
