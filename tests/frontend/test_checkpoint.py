"""Checkpoints: every layout transformers or upstream writes, and every way a folder can be damaged or hostile."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from v4c.errors import CheckpointError, ConfigError, InputError
from v4c.frontend.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.names import sources, tensor_specs
from v4c.frontend.presets import preset, with_engram

torch.set_num_threads(1)

TINY = replace(
    preset("v4-nano"),
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=16,
    qk_rope_head_dim=4,
    q_lora_rank=8,
    o_lora_rank=6,
    n_routed_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=7,
    attention_types=("sliding", "csa", "hca"),
    mlp_types=("hash", "topk", "topk"),
    index_n_heads=3,
    index_head_dim=8,
)
TABLE = "model.layers.0.mlp.gate.tid2eid"

Tensors = dict[str, torch.Tensor]


def random_tensors(config: ModelConfig = TINY, seed: int = 0) -> Tensors:
    weights = RandomCheckpoint(config, seed)
    return {name: torch.from_numpy(weights.load(name)) for name in weights.names()}


def write(folder: Path, tensors: Tensors, config: ModelConfig = TINY) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE_FILE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def upstream_tensors(tensors: Tensors, config: ModelConfig = TINY) -> Tensors:
    """The same weights under upstream's names, experts apart."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        source = sources(config, name)
        if source.join == "copy":
            result[source.pieces[0]] = tensor
            continue
        experts = [half for stack in tensor for half in (stack.chunk(2) if source.join == "stack_gate_up" else [stack])]
        result |= dict(zip(source.pieces, experts, strict=True))
    return result


def assert_loads(folder: Path, tensors: Tensors) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        loaded = checkpoint.load(name, "f32")
        expected = tensor if tensor.dtype == torch.int64 else tensor.float()
        assert loaded.dtype == expected.numpy().dtype, name
        assert np.array_equal(loaded, expected.numpy()), name
    return checkpoint


@pytest.mark.parametrize("layout", ["ours", "upstream", "new"])
@pytest.mark.parametrize(("dtype", "shard_size"), [("float32", "1GB"), ("bfloat16", "1GB"), ("float32", "20KB")])
def test_reads_what_save_pretrained_writes(layout: str, dtype: str, shard_size: str, tmp_path: Path) -> None:
    """Its names depend on those of the files the model was loaded from, or on there being none."""
    tensors = random_tensors(seed=3)
    config = replace(TINY, dtype=dtype)
    if layout == "new":
        model = DeepseekV4ForCausalLM(DeepseekV4Config(**config.to_dict()))
        model.load_state_dict(tensors)
        model.to(getattr(torch, dtype))
    else:
        folder = write(tmp_path / "source", tensors if layout == "ours" else upstream_tensors(tensors), config)
        model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        if dtype == "float32":
            assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)
    assert (tmp_path / "saved" / INDEX_FILE).exists() == (shard_size == "20KB")
    checkpoint = assert_loads(tmp_path / "saved", model.state_dict())
    assert checkpoint.unused == checkpoint.skipped == []
    assert checkpoint.config == config
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    assert checkpoint.source_dtype("lm_head.weight") == short
    assert checkpoint.source_dtype("model.layers.1.mlp.experts.gate_up_proj") == short
    assert checkpoint.source_dtype(TABLE) == "int64"


def test_upstream_layout_with_mtp_and_strangers(tmp_path: Path) -> None:
    tensors = random_tensors()
    stored = upstream_tensors(tensors)
    stored |= {name: torch.zeros(3) for name in ("mtp.0.attn.wq_a.weight", "layers.3.attn.wq_a.weight")}
    stored["rotary.table"] = torch.zeros(2)
    stored["layers.0.attn.extra"] = torch.zeros(2)
    values = TINY.to_dict()
    for key in ("layer_types", "mlp_layer_types", "rope_parameters", "partial_rotary_factor", "compress_rates"):
        del values[key]
    values |= {"compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1, "num_nextn_predict_layers": 1}
    values["rope_scaling"] = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    write(tmp_path, stored)
    (tmp_path / "config.json").write_text(json.dumps(values))
    checkpoint = assert_loads(tmp_path, tensors)
    assert checkpoint.skipped == ["layers.3.attn.wq_a.weight", "mtp.0.attn.wq_a.weight"]
    assert checkpoint.unused == ["layers.0.attn.extra", "rotary.table"]
    used = sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.total_bytes == used
    assert checkpoint.config == replace(TINY, num_nextn_predict_layers=1)


def test_engram_checkpoint(tmp_path: Path) -> None:
    config = with_engram(TINY, heads_per_ngram=2, embed_dim=3, table_rows=20)
    assert_loads(write(tmp_path, random_tensors(config), config), random_tensors(config))


def test_dtypes(tmp_path: Path) -> None:
    tensors = random_tensors()
    stored = {name: t if t.dtype == torch.int64 else t.bfloat16() for name, t in tensors.items()}
    stored[TABLE] = stored[TABLE].int()
    stored["lm_head.weight"] = tensors["lm_head.weight"].half()
    checkpoint = Checkpoint.open(write(tmp_path, stored))
    checkpoint.check()
    kinds = {name: info.kind for name, info in tensor_specs(TINY).items()}
    wanted: dict[Any, Any] = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
    for dtype in wanted:
        for name, kind in kinds.items():
            loaded = checkpoint.load(name, dtype)
            fixed = {"fp32": np.float32, "int64": np.int64}
            assert loaded.dtype == fixed.get(kind, wanted[dtype]), (name, dtype)
            exact = stored[name].float().numpy()
            assert np.array_equal(loaded.astype(np.float32), exact.astype(loaded.dtype).astype(np.float32)), name
    assert checkpoint.load("lm_head.weight").dtype == np.float16
    assert checkpoint.load("model.embed_tokens.weight").dtype == ml_dtypes.bfloat16
    assert checkpoint.load("model.norm.weight").dtype == np.float32
    with pytest.raises(InputError, match="dtype: expected one of f32, bf16, f16, found 'int8'"):
        checkpoint.load("lm_head.weight", "int8")


def test_experts_keep_their_stored_dtype(tmp_path: Path) -> None:
    stored = {n: t.bfloat16() if "experts" in n else t for n, t in upstream_tensors(random_tensors()).items()}
    loaded = Checkpoint.open(write(tmp_path, stored)).load("model.layers.2.mlp.experts.gate_up_proj")
    assert loaded.dtype == ml_dtypes.bfloat16
    exact = random_tensors()["model.layers.2.mlp.experts.gate_up_proj"].bfloat16().float()
    assert np.array_equal(loaded.astype(np.float32), exact.numpy())


def test_load_maps_the_file(tmp_path: Path) -> None:
    loaded = Checkpoint.open(write(tmp_path, random_tensors())).load("lm_head.weight")
    assert not loaded.flags.writeable
    assert not loaded.flags.owndata


def test_tokenizer(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, random_tensors()))
    assert checkpoint.tokenizer_path is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert checkpoint.tokenizer_path == tmp_path / "tokenizer.json"


def changed(**changes: torch.Tensor | None) -> Tensors:
    tensors = random_tensors()
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"model\.norm\.weight: expected a tensor of shape \[24\], found none"),
        ({GATE_UP: None}, r"experts\.gate_up_proj: expected a tensor of shape \[5, 14, 24\], found none"),
        ({"lm_head.weight": torch.zeros(24, 40)}, r"lm_head\.weight: expected shape \[40, 24\], found \[24, 40\]"),
        ({"lm_head.weight": torch.zeros(40, 24).double()}, r"lm_head\.weight: expected one of F32, .*, found F64"),
        ({"lm_head.weight": torch.zeros(40, 24).int()}, r"lm_head\.weight: expected one of F32, .*, found I32"),
        ({TABLE: torch.zeros(40, 2)}, r"tid2eid: expected one of I64, I32, found F32"),
        ({"head.weight": torch.zeros(40, 24)}, r"lm_head\.weight: expected it once, found head\.weight and lm_head"),
        (
            {GATE_UP: None, "layers.1.ffn.experts.0.w1.weight": torch.zeros(7, 24)},
            r"layers\.1\.ffn\.experts\.0\.w3\.weight: expected a tensor of shape \[7, 24\], found none",
        ),
    ],
)
def test_check_names_the_tensor(changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    write(tmp_path, changed(**changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path).check()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_experts_of_mixed_dtype(tmp_path: Path) -> None:
    stored = upstream_tensors(random_tensors())
    stored["layers.1.ffn.experts.2.w2.weight"] = stored["layers.1.ffn.experts.2.w2.weight"].half()
    with pytest.raises(CheckpointError, match=r"down_proj: expected one dtype for all experts, found F16, F32"):
        Checkpoint.open(write(tmp_path, stored)).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.0.attn.wq_a.scale": torch.ones(1, 1)}, "beside scales, found F32"),
        ({"model.layers.0.self_attn.q_a_proj.weight_scale_inv": torch.ones(1, 1)}, "beside scales, found F32"),
        ({"lm_head.weight": torch.zeros(40, 24).to(torch.float8_e4m3fn)}, "expected block scales for F8_E4M3"),
        ({"lm_head.weight": torch.zeros(40, 12, dtype=torch.int8)}, "expected block scales for I8"),
    ],
)
def test_scales_and_codes_belong_together(changes: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    write(tmp_path, changed(**changes))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path).check()


ENGRAM = with_engram(TINY, heads_per_ngram=2, embed_dim=3, table_rows=20)
HASH = "model.layers.1.engram."


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        (TABLE, (3, 1), 5),
        (TABLE, (0, 0), -1),
        ("model.engram_lookup", (7,), 40),
        ("model.engram_lookup", (7,), -1),
        (HASH + "primes", (0,), 22),
        (HASH + "offsets", (1,), 0),
        (HASH + "multipliers", (0,), 2),
        (HASH + "multipliers", (0,), -1),
        (HASH + "multipliers", (0,), 2**62 + 1),
    ],
)
def test_ids_out_of_range(name: str, place: tuple[int, ...], value: int, tmp_path: Path) -> None:
    tensors = random_tensors(ENGRAM)
    tensors[name][place] = value
    checkpoint = Checkpoint.open(write(tmp_path, tensors, ENGRAM))
    with pytest.raises(CheckpointError, match=rf"{name}: expected"):
        checkpoint.load(name)


def test_unknown_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, random_tensors()))
    with pytest.raises(CheckpointError, match=r"found model\.nonsense"):
        checkpoint.load("model.nonsense")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint folder, found nothing"):
        Checkpoint.open(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a checkpoint folder, found a file"):
        Checkpoint.open(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    with pytest.raises(CheckpointError, match=rf"expected {SINGLE_FILE} or {INDEX_FILE}, found neither"):
        Checkpoint.open(tmp_path)


def write_sharded(folder: Path) -> dict[str, str]:
    """Two shards and their index; returns the weight map."""
    folder.mkdir(exist_ok=True)
    items = list(random_tensors().items())
    weight_map: dict[str, str] = {}
    for number, part in enumerate((items[::2], items[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(dict(part), folder / file)
        weight_map |= {name: file for name, _ in part}
    (folder / "config.json").write_text(json.dumps(TINY.to_dict()))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("model-00002-of-00002.safetensors", r"found it in model-00001"),
        ("model-00003-of-00002.safetensors", r"expected the file .*model-00003-of-00002.safetensors, found none"),
        ("../outside.safetensors", "outside it"),
        ("/etc/outside.safetensors", "outside it"),
        ("sub/../../outside.safetensors", "outside it"),
        ("link.safetensors", "outside it"),
        ("loop.safetensors", "expected"),
        ("bad\0name.safetensors", "expected"),
        ("model.bin", r"expected the name of a \.safetensors file"),
        (5, r"expected the name of a \.safetensors file, found 5"),
    ],
)
def test_index_entries(value: Any, found: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    weight_map = write_sharded(folder)
    assert_loads(folder, random_tensors())
    save_file({"model.norm.weight": torch.zeros(24)}, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    name = next(name for name, file in weight_map.items() if "00001" in file)
    weight_map[name] = value
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=found) as caught:
        Checkpoint.open(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_index_without_entries(index: dict[str, Any], tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map: expected an object"):
        Checkpoint.open(tmp_path)


def test_index_with_a_duplicate(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="found 'a' twice"):
        Checkpoint.open(tmp_path)


def test_links_of_the_download_cache(tmp_path: Path) -> None:
    """A snapshot in Hugging Face's cache is made of links into its blobs, and nowhere else."""
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(snapshot, random_tensors())
    (snapshot / SINGLE_FILE).rename(blobs / "0123")
    (snapshot / SINGLE_FILE).symlink_to(Path("../../blobs/0123"))
    assert_loads(snapshot, random_tensors())
    (blobs / "0123").rename(tmp_path / "0123")
    (snapshot / SINGLE_FILE).unlink()
    (snapshot / SINGLE_FILE).symlink_to(tmp_path / "0123")
    with pytest.raises(CheckpointError, match="outside it"):
        Checkpoint.open(snapshot)


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, random_tensors()))
    last = max(checkpoint.names(), key=lambda name: checkpoint._stored[name].start)
    with (tmp_path / SINGLE_FILE).open("r+b") as file:
        file.truncate((tmp_path / SINGLE_FILE).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=rf"{last}: expected .* bytes"):
        checkpoint.load(last)
