"""A checkpoint as a GGUF file: decoded independently, it holds the checkpoint's values.

From it llama.cpp computes what transformers computes from the checkpoint, as far as its rounding allows.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.gguf_reference import BF16, BLOCK, F32, I32, Q4_0, Q8_0, Stored, read_gguf
from v4c.errors import OutputError, UnsupportedError
from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.config import EngramConfig, ModelConfig

pytest.importorskip("gguf", reason="the extra `bench` is not installed: no gguf")

from benchmarks.peer_gguf import FORMATS, check_supported, tensors, write_gguf

KINDS = {"f32": F32, "bf16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}


@pytest.fixture(scope="module", params=sorted(FORMATS))
def written(
    request: pytest.FixtureRequest, peer_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The checkpoint in one of the formats: its name and the file."""
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    write_gguf(peer_checkpoint, path, request.param)
    return request.param, path


def test_keys_are_those_of_the_config(written: tuple[str, Path], peer_config: ModelConfig) -> None:
    keys, _ = read_gguf(written[1])
    assert keys["general.architecture"] == "deepseek4"
    own = {k.removeprefix("deepseek4."): v for k, v in keys.items() if k.startswith("deepseek4.")}
    assert own["attention.compress_ratios"] == [0, 4, 128]
    assert own["hash_layer_count"] == 1
    assert own["expert_gating_func"] == 4
    assert own["expert_weights_scale"] == pytest.approx(peer_config.routed_scaling_factor)
    assert own["embedding_length_out"] == 4 * peer_config.hidden_size
    assert own["swiglu_clamp_exp"] == [peer_config.swiglu_limit] * 3
    assert own["rope.scaling.type"] == "yarn"
    assert own["rope.scaling.factor"] == 16.0
    assert own["attention.indexer.top_k"] == peer_config.index_topk


def test_values_are_those_of_the_checkpoint(written: tuple[str, Path], peer_checkpoint: Checkpoint) -> None:
    storage, path = written
    _, stored = read_gguf(path)
    used = set()
    for name, tensor in stored.items():
        source, rows = next((t.source, t.rows) for t in tensors(peer_checkpoint, storage) if t.name == name)
        used.add(source)
        whole = peer_checkpoint.load(source, "f32")
        expected = whole if rows is None else whole[:, rows]
        assert tensor.values().shape == expected.shape, name
        if tensor.kind in (Q8_0, Q4_0):
            _assert_rounded(name, tensor, expected)
        else:  # the checkpoint is bfloat16
            np.testing.assert_array_equal(tensor.values(), expected, err_msg=name)
    assert used == set(peer_checkpoint.names())


def _assert_rounded(name: str, tensor: Stored, expected: np.ndarray) -> None:
    """Each number is the nearest step, or (the one side Q4_0 has a step less on) at most a step away."""
    scale = np.abs(tensor.scales())[:, None]
    wanted = expected.reshape(-1, BLOCK)
    error = np.abs(tensor.values().reshape(-1, BLOCK) - wanted)
    largest = np.abs(wanted).max(axis=1, keepdims=True)
    half_steps = {Q8_0: 1.0, Q4_0: 2.0}[tensor.kind]
    # The scale is rounded to float16 (2**-11), which moves the outermost steps.
    assert (error <= half_steps * scale / 2 + largest * 2**-10).all(), name
    np.testing.assert_allclose(scale * {Q8_0: 127, Q4_0: 8}[tensor.kind], largest, rtol=2**-10, err_msg=name)


def test_only_matrices_are_rounded(written: tuple[str, Path]) -> None:
    storage, path = written
    _, stored = read_gguf(path)
    kinds = {name: tensor.kind for name, tensor in stored.items()}
    assert kinds["blk.0.ffn_gate_tid2eid.weight"] == I32
    always = ("norm.weight", "ffn_gate_inp.weight", "sinks.weight", "ape.weight", "probs_b.bias")
    for name, kind in kinds.items():
        if "hc_" in name or name.endswith(always):
            assert kind == F32, name
        elif not name.endswith("tid2eid.weight"):
            assert kind == KINDS[storage], name


def test_gate_and_up_of_the_experts_are_told_apart(peer_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(peer_checkpoint, path, "f32")
    _, stored = read_gguf(path)
    both = peer_checkpoint.load("model.layers.1.mlp.experts.gate_up_proj", "f32")
    gate, up = (stored[f"blk.1.ffn_{half}_exps.weight"].values() for half in ("gate", "up"))
    np.testing.assert_array_equal(np.concatenate([gate, up], axis=1), both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_head_dim": 32}, "expected an index_head_dim in multiples of 64, found 32"),
        ({"csa_ratio": 8}, "expected csa layers to compress by 4, found 8"),
        ({"mlp_types": ("topk", "hash", "topk")}, "expected hash-routed layers to be the first ones"),
        ({"moe_intermediate_size": 48}, "expected widths in multiples of 32"),
        (
            {"engram": EngramConfig(layer_ids=(1,), heads_per_ngram=2, embed_dim=8, table_rows=320, pad_id=2)},
            "without Engram",
        ),
    ],
)
def test_what_llama_cannot_run_is_refused(peer_config: ModelConfig, change: dict, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_supported(replace(peer_config, **change), "q8_0")


def test_failure_leaves_nothing_behind(
    peer_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(name: str, dtype: str | None = None) -> np.ndarray:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peer_checkpoint, "load", full)
    with pytest.raises(OutputError, match=r"model\.gguf: cannot be written: No space left on device"):
        write_gguf(peer_checkpoint, tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_computes_what_transformers_computes(written: tuple[str, Path], peer_folder: Path) -> None:
    """A prompt in two chunks, then steps; the second chunk read again from a saved state gives the same."""
    from benchmarks.peer_llama import LlamaEngine
    from benchmarks.peer_measure import agreement
    from benchmarks.peer_transformers import TransformersEngine

    storage, path = written
    llama, reference = LlamaEngine(path, 1, storage), TransformersEngine(peer_folder, 1, "f32")
    tokens = np.random.default_rng(5).integers(0, llama.vocab_size, 300)
    ours, theirs = llama.begin(512), reference.begin(512)
    for state in (ours, theirs):
        state.read(tokens[:150])
    assert ours.mark()
    pieces = [tokens[150:290], *(tokens[i : i + 1] for i in range(290, 300))]
    found = np.stack([ours.read(piece).copy() for piece in pieces])
    expected = np.stack([theirs.read(piece) for piece in pieces])
    # llama.cpp caches in float16 and rounds the rows it multiplies with blocks to 8 bits.
    tolerance = {"f32": 0.01, "bf16": 0.05, "q8_0": 0.1, "q4_0": 0.6}[storage]
    assert agreement(expected, found, tolerance)["agrees"], agreement(expected, found, tolerance)
    ours.rewind()
    again = agreement(found[:1], ours.read(pieces[0])[None], tolerance)  # other cells, other order of sums
    assert again["agrees"], again
    ours.close()
