"""What peers load is made once, and again when what it was made from or by has changed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import v4c
from benchmarks import peer_list
from benchmarks.peer_list import PEERS, chosen, prepare, prepare_checkpoint
from v4c.errors import InputError
from v4c.frontend.config import ModelConfig


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call of `v4c.compile`, which makes an empty folder instead of an artifact."""
    calls: list[dict[str, Any]] = []

    def compile(source: Path, path: Path, **options: Any) -> None:
        Path(path).mkdir()  # fails where an older one still stands
        calls.append(options)

    monkeypatch.setattr(v4c, "compile", compile)
    return calls


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of the files that decide what is made, in a tree of its own."""
    root = tmp_path / "sources"
    shutil.copytree(peer_list.ROOT / "v4c", root / "v4c", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(peer_list.ROOT / "runtime", root / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "targets" / "cpu").mkdir(parents=True)
    kernel = root / "targets" / "cpu" / "kernel.py"
    kernel.write_text("one = 1\n")
    monkeypatch.setattr(peer_list, "ROOT", root)
    return kernel


def test_an_artifact_is_made_once_for_each_state_of_the_sources(
    peer_folder: Path, tmp_path: Path, made: list[dict[str, Any]], sources: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copytree(peer_folder, folder / "checkpoint")
    for _ in range(2):
        prepare(PEERS["v4c-int8"], folder)
    assert made == [{"dtype": "bf16", "quant": "int8"}]
    sources.write_text("one = 2\n")
    prepare(PEERS["v4c-int8"], folder)
    assert len(made) == 2
    prepare(PEERS["v4c-bf16"], folder)
    assert made[2] == {"dtype": "bf16", "quant": "none"}
    prepare(PEERS["v4c-bf16-act"], folder)
    assert made[3] == {"dtype": "bf16", "quant": "none", "activations": "bf16"}


def test_a_failure_is_not_taken_for_an_artifact(
    peer_folder: Path, tmp_path: Path, made: list[dict[str, Any]], sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copytree(peer_folder, folder / "checkpoint")
    prepare(PEERS["v4c-int8"], folder)
    sources.write_text("one = 2\n")

    def fails(*arguments: Any, **options: Any) -> None:
        raise v4c.Error("no")

    with monkeypatch.context() as patched:
        patched.setattr(v4c, "compile", fails)
        with pytest.raises(v4c.Error):
            prepare(PEERS["v4c-int8"], folder)
    prepare(PEERS["v4c-int8"], folder)
    assert len(made) == 2


def test_a_checkpoint_of_other_sizes_is_refused(peer_config: ModelConfig, tmp_path: Path) -> None:
    prepare_checkpoint(peer_config, tmp_path)
    before = (tmp_path / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    prepare_checkpoint(peer_config, tmp_path)
    assert (tmp_path / "checkpoint" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="found another config"):
        prepare_checkpoint(replace(peer_config, vocab_size=400), tmp_path)


def test_the_reference_is_always_among_the_peers() -> None:
    assert [peer.name for peer in chosen(["llama-q8_0", "v4c-int8"])] == ["v4c-bf16", "v4c-int8", "llama-q8_0"]
    with pytest.raises(InputError, match=r"--peers: expected some of v4c-f32.*found llama-q2"):
        chosen(["llama-q2"])
