"""The MTP layer: the published arithmetic written out, decode equal to prefill, and its tensors in both layouts."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import DeepseekV4ForCausalLM

from v4c.errors import CheckpointError, InputError, OutputError
from v4c.frontend.checkpoint import SINGLE_FILE, Checkpoint
from v4c.frontend.initialise import RandomCheckpoint, initialise
from v4c.frontend.model.caches import allocate
from v4c.frontend.model.model import V4Model
from v4c.frontend.model.mtp import MTPModel, allocate_mtp, mtp_caches
from v4c.frontend.names import mtp_specs, tensor_specs
from v4c.frontend.presets import preset
from v4c.frontend.save import LAYOUTS, save_checkpoint

torch.set_num_threads(1)

NANO = replace(preset("v4-nano"), num_nextn_predict_layers=1)
SMALL = replace(
    NANO,
    vocab_size=97,
    hidden_size=64,
    num_hidden_layers=2,
    attention_types=("sliding", "csa"),
    mlp_types=("hash", "topk"),
    sliding_window=9,
)


def run_main(model: V4Model, ids: torch.Tensor) -> torch.Tensor:
    """Streams ``[B, S, M, D]`` of whole sequences."""
    batch, chunk = ids.shape
    caches = allocate(model.config, batch, chunk)
    return model.hidden(ids, torch.zeros(batch, dtype=torch.int64), torch.full((batch,), chunk), caches)[0]


def by_hand(source: RandomCheckpoint, streams: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    """The published arithmetic on checkpoint tensors; the decoder layer is a sliding layer of a model of one layer."""
    config = source.config

    def weight(name: str) -> torch.Tensor:
        return torch.from_numpy(source.load(name, "f32"))

    def rms(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight(name)

    embedding = weight("model.embed_tokens.weight")[next_ids]
    joined = F.linear(rms(streams, "mtp.0.hnorm.weight"), weight("mtp.0.h_proj.weight"))
    joined = joined + F.linear(rms(embedding, "mtp.0.enorm.weight"), weight("mtp.0.e_proj.weight"))[:, :, None]

    class AsModel:
        """The decoder layer's tensors under the names of a model's first layer."""

        config = source.config.mtp_layer()

        def load(self, name: str, dtype: str | None = None) -> np.ndarray:
            return source.load(name.replace("model.layers.0.", "mtp.0."), dtype)

    one = V4Model.from_source(AsModel())
    batch, chunk = next_ids.shape
    where = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), chunk)
    out, _ = one.layers[0](joined, next_ids, *where, one.inv_freq_main, None, allocate(one.config, batch, chunk)[0])

    flat = out.flatten(2)
    flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    mix = F.linear(flat, weight("mtp.0.hc_head.hc_fn")) * weight("mtp.0.hc_head.hc_scale")
    mix = torch.sigmoid(mix + weight("mtp.0.hc_head.hc_base")) + config.hc_eps
    return F.linear(rms((mix[..., None] * out).sum(2), "mtp.0.norm.weight"), weight("lm_head.weight"))


@torch.no_grad()
def test_published_arithmetic() -> None:
    source = RandomCheckpoint(NANO, seed=3)
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, NANO.vocab_size, (2, 161)))
    streams = run_main(V4Model.from_source(source), ids[:, :-1])
    mtp = MTPModel.from_source(source)
    where = torch.zeros(2, dtype=torch.int64), torch.full((2,), 160)
    logits, _, _ = mtp(streams, ids[:, 1:], *where, allocate_mtp(NANO, 2, 160), all_logits=True)
    torch.testing.assert_close(logits, by_hand(source, streams, ids[:, 1:]), rtol=0, atol=2e-5)
    assert 0.5 < logits.std() < 2
    last, _, _ = mtp(streams, ids[:, 1:], *where, allocate_mtp(NANO, 2, 160))
    torch.testing.assert_close(last, logits[:, -1], rtol=0, atol=1e-5)


@torch.no_grad()
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 29), max_size=4), seed=st.integers(0, 99))
def test_chunks_equal_one_shot(cuts: list[int], seed: int) -> None:
    """Chunks of any length, with the window of 9 in between, give what one call gives."""
    source = RandomCheckpoint(SMALL, seed=seed)
    mtp, rng = MTPModel.from_source(source), np.random.default_rng(seed)
    streams = torch.from_numpy(rng.standard_normal((2, 30, 4, 64), dtype=np.float32))
    ids = torch.from_numpy(rng.integers(0, SMALL.vocab_size, (2, 30)))
    zero = torch.zeros(2, dtype=torch.int64)
    whole, _, _ = mtp(streams, ids, zero, zero + 30, allocate_mtp(SMALL, 2, 30), all_logits=True)
    parts, caches = [], allocate_mtp(SMALL, 2, 30)
    edges = [0, *sorted(set(cuts)), 30]
    for start, stop in pairwise(edges):
        where = zero + start, zero + stop - start
        logits, _, caches = mtp(streams[:, start:stop], ids[:, start:stop], *where, caches, all_logits=True)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-5)


def test_caches_follow_the_models() -> None:
    (window,) = mtp_caches(SMALL)
    assert (window.path, window.shape(3, 500)) == ("2.window", (3, 9, 64))


def test_no_such_layer() -> None:
    with pytest.raises(InputError, match=r"expected one below num_nextn_predict_layers \(0\), found 0"):
        MTPModel.from_source(RandomCheckpoint(replace(SMALL, num_nextn_predict_layers=0)))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_and_read_back(layout: Any, dtype: Any, tmp_path: Path) -> None:
    source = RandomCheckpoint(SMALL, seed=1)
    names = [*source.specs, *source.mtp_specs]
    tensors = {name: source.load(name) for name in names}
    save_checkpoint(SMALL, tensors, tmp_path / "out", layout, dtype, {"tokenizer.json": b"{}"})
    checkpoint = Checkpoint.open(tmp_path / "out")
    checkpoint.check()
    assert checkpoint.unused == []
    assert set(checkpoint.mtp_specs) == set(mtp_specs(SMALL))
    assert checkpoint.config == replace(SMALL, dtype="float32" if dtype == "f32" else "bfloat16")
    assert checkpoint.tokenizer_path == tmp_path / "out" / "tokenizer.json"
    for name in names:
        wanted = source.load(name, None if dtype == "f32" else "bf16")
        assert np.array_equal(checkpoint.load(name), wanted), name
    with safe_open(tmp_path / "out" / SINGLE_FILE, "np") as file:
        stored = set(file.keys())
    assert ("mtp.0.attn.wq_a.weight" in stored, "mtp.0.hc_head_fn" in stored) == (layout == "upstream",) * 2
    assert ("mtp.0.mlp.experts.gate_up_proj" in stored) == (layout == "hf")
    MTPModel.from_source(checkpoint)


def test_bad_tensors_leave_nothing(tmp_path: Path) -> None:
    source = RandomCheckpoint(SMALL)
    tensors = {name: source.load(name) for name in tensor_specs(SMALL)}
    with pytest.raises(CheckpointError, match=r"^mtp\.0\.self_attn\.sinks: expected float32 .* found none$"):
        save_checkpoint(SMALL, tensors, tmp_path / "out")
    tensors |= {name: source.load(name) for name in mtp_specs(SMALL)}
    with pytest.raises(InputError, match="layout: expected one of hf, upstream, found 'other'"):
        save_checkpoint(SMALL, tensors, tmp_path / "out", "other")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="expected the name of a file"):
        save_checkpoint(SMALL, tensors, tmp_path / "out", files={"../x": b""})
    assert list(tmp_path.iterdir()) == []


def test_random_checkpoint_has_the_layer_and_transformers_ignores_it(tmp_path: Path) -> None:
    initialise(NANO, tmp_path / "nano", seed=4)
    checkpoint = Checkpoint.open(tmp_path / "nano")
    random = RandomCheckpoint(NANO, seed=4)
    assert set(checkpoint.mtp_specs) == set(mtp_specs(NANO))
    for name in checkpoint.mtp_specs:
        assert np.array_equal(checkpoint.load(name), random.load(name)), name
    loaded: Any = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "nano", output_loading_info=True)
    assert not any(loaded[1].values()), loaded[1]
