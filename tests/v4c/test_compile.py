"""`v4c.compile` from every kind of source, and its options; numbers are compared with the torch reference."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import v4c
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.model.model import V4Model
from v4c.passes.pipeline import ONNX_PASSES, OPTIONAL
from v4c.passes.relax.layouts import part_names
from v4c.runtime.artifact import read_manifest

LENGTH = 140


def logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """One-shot logits [B, S, V] of the artifact at `path`."""
    return v4c.load(path).new_session(batch=len(ids), max_context=ids.shape[1]).prefill(ids, all_logits=True)


def reference(source: object, ids: np.ndarray) -> np.ndarray:
    return V4Model.from_source(source).logits(torch.from_numpy(ids)).numpy()


def random_ids(config: ModelConfig, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(11).integers(0, config.vocab_size, (batch, LENGTH))


@pytest.fixture(scope="module")
def one_layer(tiny_config: ModelConfig) -> ModelConfig:
    """The smallest model that has a compressor: compiled several times below."""
    return replace(tiny_config, num_hidden_layers=1, attention_types=("hca",), mlp_types=("topk",), vocab_size=64)


def test_engram_model(tiny_engram: ModelConfig, tmp_path: Path) -> None:
    source = RandomCheckpoint(tiny_engram, seed=5)
    v4c.compile(source, tmp_path / "m")
    ids = random_ids(tiny_engram)
    expected = reference(source, ids)
    assert np.abs(logits(tmp_path / "m", ids) - expected).max() <= 1e-3
    session = v4c.load(tmp_path / "m").new_session(batch=2, max_context=LENGTH)
    session.prefill(ids[:, :50])
    for t in range(50, LENGTH):
        assert np.abs(session.decode(ids[:, t]) - expected[:, t]).max() <= 1e-3


def test_onnx_file_as_source_equals_the_checkpoint(tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    v4c.export(tiny_checkpoint, tmp_path / "m.onnx", all_logits=True)
    v4c.compile(tmp_path / "m.onnx", tmp_path / "m")
    ids = np.random.default_rng(1).integers(0, 300, (1, 60))
    assert np.array_equal(logits(tmp_path / "m", ids), logits(tiny_artifact, ids))


def test_half_precision_weights(one_layer: ModelConfig, tmp_path: Path) -> None:
    class Rounded(RandomCheckpoint):
        def load(self, name: str, dtype: str | None = None) -> np.ndarray:
            array = super().load(name, dtype)
            if self.config is one_layer and array.dtype == np.float32 and stored.get(name) == "bfloat16":
                return torch.from_numpy(array).bfloat16().float().numpy()
            return array

    source = RandomCheckpoint(one_layer, seed=1)
    v4c.compile(source, tmp_path / "m", dtype="bf16")
    manifest = read_manifest(tmp_path / "m")
    stored = {part: w.dtype for w in manifest.weights for part in part_names(w.name)}
    assert stored["lm_head.weight"] == stored["model.layers.0.mlp.experts.down_proj"] == "bfloat16"
    assert stored["model.layers.0.self_attn.sinks"] == stored["model.layers.0.mlp.gate.weight"] == "float32"
    assert stored["model.layers.0.self_attn.q_a_proj.weight"] == "bfloat16"
    ids = random_ids(one_layer)
    found, expected = logits(tmp_path / "m", ids), reference(Rounded(one_layer, seed=1), ids)
    assert np.abs(found - expected).max() <= 1e-3


def test_a_graph_without_weights_compiles_and_does_not_run(one_layer: ModelConfig, tmp_path: Path) -> None:
    v4c.compile(one_layer, tmp_path / "m", weights=False)
    manifest = read_manifest(tmp_path / "m")
    assert not manifest.has_weights
    assert {f.suffix for f in (tmp_path / "m").iterdir()} == {".so", ".json"}
    with pytest.raises(v4c.ArtifactError, match="expected weights, found none"):
        v4c.load(tmp_path / "m").new_session()


def test_passes_can_be_disabled_and_dumped(one_layer: ModelConfig, tmp_path: Path) -> None:
    source, ids = RandomCheckpoint(one_layer, seed=2), random_ids(one_layer, batch=1)
    expected = reference(source, ids)
    v4c.compile(source, tmp_path / "all", dump_ir=tmp_path / "ir")
    passes = [p.pass_name for p in ONNX_PASSES]
    (plain,) = (tmp_path / "ir").glob("onnx-00-export.txt")
    (last,) = (tmp_path / "ir").glob(f"onnx-{len(passes):02d}-*.txt")
    (imported,) = (tmp_path / "ir").glob("relax-00-import.py")
    assert "MixtureOfExperts" not in plain.read_text()
    assert "MixtureOfExperts" in last.read_text()
    assert "heavily_compressed_attention" in imported.read_text()
    v4c.compile(source, tmp_path / "none", disable_passes=OPTIONAL)
    manifest = read_manifest(tmp_path / "none")
    assert manifest.build["disabled_passes"] == sorted(OPTIONAL)
    assert "decode_one" in read_manifest(tmp_path / "all").entry_points
    assert "decode_one" not in manifest.entry_points
    for name in ("all", "none"):
        assert np.abs(logits(tmp_path / name, ids) - expected).max() <= 1e-3


def test_an_older_processor_level(one_layer: ModelConfig, tmp_path: Path) -> None:
    source, ids = RandomCheckpoint(one_layer, seed=3), random_ids(one_layer, batch=1)
    v4c.compile(source, tmp_path / "m", target="cpu:x86-64-v3")
    target = read_manifest(tmp_path / "m").target
    assert target.name == "cpu:x86-64-v3"
    assert "avx2" in target.cpu_features
    assert not any(f.startswith("avx512") for f in target.cpu_features)
    assert np.abs(logits(tmp_path / "m", ids) - reference(source, ids)).max() <= 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tpu"}, "target 'tpu': expected one of cpu"),
        ({"target": "cpu:z80"}, "target cpu:z80: expected one of x86-64"),
        ({"disable_passes": ["legalize"]}, "pass 'legalize': cannot be disabled"),
        ({"quant": "int3"}, "quant 'int3': expected one of none"),
        ({"kv": "fp4"}, "kv 'fp4': expected one of f32, bf16, fp8"),
        ({"dtype": "f64"}, "dtype 'f64': expected one of f32, bf16"),
    ],
)
def test_unsupported_options(one_layer: ModelConfig, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(v4c.UnsupportedError) as error:
        v4c.compile(one_layer, tmp_path / "m", weights=False, **options)
    assert message in str(error.value)
    assert not any(tmp_path.iterdir())


def test_dry_run_writes_nothing(tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    report = v4c.compile(tiny_checkpoint, tmp_path / "m", dry_run=True)
    assert isinstance(report, dict)
    assert not any(tmp_path.iterdir())
    stored = read_manifest(tiny_artifact).weights
    assert report["tensors"] == len(stored)
    assert report["weight_bytes"] == sum(w.nbytes for w in stored)


def test_foreign_and_damaged_onnx_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.onnx").write_bytes(b"not a model")
    with pytest.raises(v4c.Error, match=r"noise\.onnx"):
        v4c.compile(tmp_path / "noise.onnx", tmp_path / "m")
    v4c.export(tiny_checkpoint, tmp_path / "m.onnx", weights=False)
    with pytest.raises(v4c.CheckpointError, match="without"):
        v4c.compile(tmp_path / "m.onnx", tmp_path / "m")
    v4c.export(tiny_checkpoint, tmp_path / "w.onnx")
    data = tmp_path / "w.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(v4c.CheckpointError):
        v4c.compile(tmp_path / "w.onnx", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_export_of_a_damaged_checkpoint_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    for action in (v4c.export, v4c.compile):
        with pytest.raises(v4c.CheckpointError, match=shard.name):
            action(broken, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_full_size_graph(tmp_path: Path) -> None:
    """V4-Flash's 43 layers, without weights: the trace costs no memory and the file holds every layer."""
    import onnx

    v4c.export(v4c.preset("v4-flash"), tmp_path / "flash.onnx", weights=False)
    onnx.checker.check_model(str(tmp_path / "flash.onnx"), full_check=True)
    model = onnx.load(tmp_path / "flash.onnx")
    calls = [n.op_type for n in model.graph.node]
    assert sum(c.startswith("CSA") for c in calls) == 21
    assert sum(c.startswith("HCA") for c in calls) == 20
    assert sum(c.startswith("Sliding") for c in calls) == 2
    assert sum(c.endswith("HashLayer") for c in calls) == 3
