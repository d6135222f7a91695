"""Random checkpoints: transformers loads them, values depend on name and seed alone, and failures leave nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from v4c.errors import CheckpointError, OutputError
from v4c.frontend import initialise as module
from v4c.frontend.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from v4c.frontend.initialise import RandomCheckpoint, initialise, random_tensor
from v4c.frontend.names import tensor_specs
from v4c.frontend.presets import preset
from v4c.frontend.safetensors_reader import read_header

torch.set_num_threads(1)

NANO = preset("v4-nano")


@pytest.mark.parametrize(("dtype", "shard_bytes"), [("f32", 2 << 30), ("f32", 600_000), ("bf16", 1_100_000)])
def test_transformers_loads_it(dtype: Any, shard_bytes: int, tmp_path: Path) -> None:
    folder = tmp_path / "nano"
    initialise(NANO, folder, seed=5, dtype=dtype, shard_bytes=shard_bytes)
    loaded: Any = DeepseekV4ForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    model, info = loaded
    assert not any(info.values()), info
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    assert checkpoint.unused == []
    for name, tensor in model.state_dict().items():
        assert np.array_equal(
            checkpoint.load(name, "f32"), tensor.numpy() if tensor.dtype == torch.int64 else tensor.float()
        )
    if dtype == "f32":
        tokens = torch.from_numpy(np.random.default_rng(1).integers(0, NANO.vocab_size, (1, 300)))
        with torch.no_grad():
            logits = model(tokens).logits
        assert torch.isfinite(logits).all()
        assert 0.7 < logits.std() < 1.4


@pytest.mark.parametrize("name", ["v4-nano", "v4-nano-engram"])
def test_values_depend_on_name_and_seed_alone(name: str, tmp_path: Path) -> None:
    config = preset(name)
    weights = RandomCheckpoint(config, seed=9)
    for number, shard_bytes in enumerate((2 << 30, 300_000)):
        initialise(config, tmp_path / str(number), seed=9, shard_bytes=shard_bytes)
        checkpoint = Checkpoint.open(tmp_path / str(number))
        checkpoint.check()
        assert checkpoint.config == config
        assert checkpoint.names() == weights.names()
        for tensor in weights.names():
            assert np.array_equal(checkpoint.load(tensor), weights.load(tensor)), tensor
            assert checkpoint.source_dtype(tensor) == weights.source_dtype(tensor)
    assert checkpoint.total_bytes == weights.total_bytes


def test_seeds_and_names_differ() -> None:
    q_a = "model.layers.{}.self_attn.q_a_proj.weight"
    first = random_tensor(NANO, q_a.format(0), 1)
    assert np.array_equal(first, random_tensor(NANO, q_a.format(0), 1))
    for other in (random_tensor(NANO, q_a.format(1), 1), random_tensor(NANO, q_a.format(0), 2)):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is the same whether it is drawn at once or in odd pieces."""
    names = ("lm_head.weight", "model.layers.3.mlp.experts.down_proj", "model.layers.2.attn_hc.scale")
    whole = [random_tensor(NANO, name) for name in names]
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 1009)
    assert all(np.array_equal(random_tensor(NANO, name), tensor) for name, tensor in zip(names, whole, strict=True))


def test_every_tensor_matters() -> None:
    """No float tensor is constant, none is so wide that it drowns the others, and norms stand around 1."""
    config = preset("v4-nano-engram")
    for name, info in tensor_specs(config).items():
        values = random_tensor(config, name)
        assert values.shape == info.shape
        if info.kind == "int64":
            assert values.dtype == np.int64
            continue
        assert values.dtype == np.float32
        if info.size > 1:
            assert len(np.unique(values)) > info.size * 0.9
        if info.size > 500:
            scale = values.std() * (np.sqrt(info.shape[-1]) if info.kind == "weight" and "embed" not in name else 1)
            assert 0.01 < scale < 2, name
        if name.endswith("norm.weight") and info.size > 100:
            assert values.mean() == pytest.approx(1, abs=0.1)


def test_expert_table_is_distinct_and_uses_all_experts() -> None:
    table = random_tensor(NANO, "model.layers.0.mlp.gate.tid2eid")
    assert table.min() == 0
    assert table.max() == NANO.n_routed_experts - 1
    assert all(len(set(row)) == NANO.num_experts_per_tok for row in table.tolist())
    counts = np.bincount(table.ravel())
    assert counts.min() > 0.8 * counts.mean()


def test_engram_lookup_is_many_to_one() -> None:
    lookup = random_tensor(preset("v4-nano-engram"), "model.engram_lookup")
    used = np.unique(lookup)
    assert used.tolist() == list(range(len(used)))
    assert len(used) < 0.9 * len(lookup)


def test_random_checkpoint_dtypes() -> None:
    weights = RandomCheckpoint(NANO)
    weights.check()
    exact = weights.load("lm_head.weight")
    rounded = weights.load("lm_head.weight", "bf16")
    assert np.array_equal(rounded.astype(np.float32), torch.from_numpy(exact).bfloat16().float().numpy())
    assert weights.load("model.norm.weight", "bf16").dtype == np.float32
    with pytest.raises(CheckpointError, match="found nonsense"):
        weights.load("nonsense")


def test_shards_stay_below_their_size(tmp_path: Path) -> None:
    limit = 300_000
    initialise(NANO, tmp_path / "nano", shard_bytes=limit)
    files = sorted((tmp_path / "nano").glob("*.safetensors"))
    assert len(files) > 3
    assert not (tmp_path / "nano" / SINGLE_FILE).exists()
    for file in files:
        tensors = read_header(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= limit or len(tensors) == 1
        assert min(tensor.start for tensor in tensors.values()) % 64 == 0
        assert not any(".experts." in name and tensor.nbytes > limit for name, tensor in tensors.items())


def test_progress_adds_up(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    initialise(NANO, tmp_path / "nano", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    total = RandomCheckpoint(NANO).total_bytes
    assert calls[-1] == (total, total)


def test_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for name in ("full", "file", "link"):
        with pytest.raises(OutputError, match=f"{name}: expected no such folder, or an empty one"):
            initialise(NANO, tmp_path / name)
    with pytest.raises(OutputError, match="expected an existing parent folder"):
        initialise(NANO, tmp_path / "no" / "such")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    initialise(NANO, "empty")
    assert {path.name for path in Path("empty").iterdir()} == {SINGLE_FILE, "config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def disk_full(done: int, total: int) -> None:
    if done > total // 2:
        raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(done: int, total: int) -> None:
    if done > total // 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("progress", "error"), [(disk_full, OutputError), (interrupted, KeyboardInterrupt)])
@pytest.mark.parametrize("exists", [True, False])
def test_failures_leave_nothing(
    progress: Callable[[int, int], None], error: type[BaseException], exists: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "nano"
    if exists:
        folder.mkdir()
    with pytest.raises(error):
        initialise(NANO, folder, progress=progress, shard_bytes=1_000_000)
    assert [path.name for path in tmp_path.rglob("*")] == (["nano"] if exists else [])


def test_a_model_larger_than_the_disk_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(OutputError, match=r"expected 12\.9 GB of free space, found 1\.0 GB"):
        initialise(preset("flash-slice"), tmp_path / "slice", dtype="bf16", progress=interrupted)
    assert list(tmp_path.iterdir()) == []


def test_index_lists_every_tensor(tmp_path: Path) -> None:
    initialise(NANO, tmp_path / "nano", shard_bytes=10_000_000)
    checkpoint = Checkpoint.open(tmp_path / "nano")
    assert (tmp_path / "nano" / INDEX_FILE).exists()
    assert checkpoint.total_bytes == sum(
        tensor.nbytes for file in (tmp_path / "nano").glob("*.safetensors") for tensor in read_header(file).values()
    )
