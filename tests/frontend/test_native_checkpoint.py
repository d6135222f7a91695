"""Published formats: read as transformers reads them, in both namings, in slices, and refused when anything is off."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM

from v4c.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from v4c.frontend.block_formats import E2M1, E4M3, E8M0
from v4c.frontend.checkpoint import SINGLE_FILE, Checkpoint
from v4c.frontend.config import ModelConfig
from v4c.frontend.estimate import mtp_weight_bytes, weight_bytes
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.initialise_native import initialise_native
from v4c.frontend.names import canonical, is_mtp, mtp_specs, scaled_weight, sources, tensor_specs
from v4c.frontend.native_layout import native_format, published_config
from v4c.frontend.presets import preset, with_engram
from v4c.frontend.safetensors_reader import read_header

torch.set_num_threads(1)

NANO = replace(preset("v4-nano"), num_nextn_predict_layers=1, dtype="bfloat16")
# Nothing is a multiple of 128 or 32; expert rows have an odd number of columns.
RAGGED = replace(
    NANO,
    vocab_size=44,
    hidden_size=150,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=34,
    qk_rope_head_dim=4,
    q_lora_rank=37,
    o_lora_rank=70,
    n_routed_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=35,
    attention_types=("sliding", "csa", "hca"),
    mlp_types=("hash", "topk", "topk"),
    index_n_heads=3,
    index_head_dim=8,
)
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
Q_A, Q_B = "model.layers.1.self_attn.q_a_proj.weight", "model.layers.1.self_attn.q_b_proj.weight"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published-layout checkpoint of `RAGGED`; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("native") / "ragged"
    initialise_native(RAGGED, folder, seed=5)
    return folder


def test_transformers_reads_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, scales, nibble order, the join of experts and the config: all 182 tensors, bit for bit."""
    # It asks for accelerate before anything else, and then dequantises without it.
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    initialise_native(NANO, tmp_path / "native", seed=1)
    model = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    checkpoint = Checkpoint.open(tmp_path / "native")
    state = model.state_dict()
    assert set(state) == set(checkpoint.names())
    for name, tensor in state.items():
        loaded = checkpoint.load(name, "f32")
        assert np.array_equal(loaded, tensor.double().numpy()), name
    formats = Counter(checkpoint.source_dtype(name) for name in checkpoint.names())
    assert formats == {"fp4": 12, "fp8": 6 * 8 + 3, "bf16": 60, "f32": 57, "int64": 2}
    assert checkpoint.config == NANO


def by_hand(tensors: Tensors, weight: str, scale: str, rows: int, columns: int) -> np.ndarray:
    """A matrix as upstream's files hold it, element by element."""
    codes, scales = tensors[weight].view(torch.uint8).numpy(), tensors[scale].view(torch.uint8).numpy()
    values = np.empty((rows, columns), np.float32)
    for r in range(rows):
        for c in range(columns):
            if tensors[weight].dtype == torch.int8:
                values[r, c] = E2M1[codes[r, c // 2] >> 4 * (c % 2) & 15] * E8M0[scales[r, c // 32]]
            else:
                values[r, c] = E4M3[codes[r, c]] * E8M0[scales[r // 128, c // 128]]
    return values


def test_ragged_edges(ragged: Path) -> None:
    tensors, checkpoint = load_file(ragged / SINGLE_FILE), Checkpoint.open(ragged)
    checkpoint.check()
    assert (checkpoint.unused, checkpoint.config) == ([], RAGGED)
    down = checkpoint.load("model.layers.2.mlp.experts.down_proj", "f32")
    gate_up = checkpoint.load("model.layers.2.mlp.experts.gate_up_proj", "f32")
    prefix = "layers.2.ffn.experts.3"
    assert tensors[f"{prefix}.w2.weight"].shape == (150, 18)
    assert tensors[f"{prefix}.w2.scale"].shape == (150, 2)
    assert np.array_equal(down[3], by_hand(tensors, f"{prefix}.w2.weight", f"{prefix}.w2.scale", 150, 35))
    for part, rows in (("w1", slice(0, 35)), ("w3", slice(35, 70))):
        wanted = by_hand(tensors, f"{prefix}.{part}.weight", f"{prefix}.{part}.scale", 35, 150)
        assert np.array_equal(gate_up[3, rows], wanted)
    wanted = by_hand(tensors, "layers.1.attn.wo_b.weight", "layers.1.attn.wo_b.scale", 150, 140)
    assert tensors["layers.1.attn.wo_b.scale"].shape == (2, 2)
    assert np.array_equal(checkpoint.load("model.layers.1.self_attn.o_b_proj.weight"), wanted)
    random = RandomCheckpoint(RAGGED, seed=5)  # what the file was rounded from
    for name in checkpoint.names():
        exact, stored = random.load(name, "f32"), checkpoint.load(name, "f32")
        bound = {"fp4": 0.25, "fp8": 1 / 16, "bf16": 1 / 256}.get(checkpoint.source_dtype(name), 0)
        assert (np.abs(stored - exact) <= bound * np.abs(exact).max()).all(), name


def test_hugging_face_names_are_the_same_model(ragged: Path, tmp_path: Path) -> None:
    initialise_native(RAGGED, tmp_path / "hf", seed=5, naming="hf")
    hf, upstream = Checkpoint.open(tmp_path / "hf"), Checkpoint.open(ragged)
    hf.check()
    stored = read_header(tmp_path / "hf" / SINGLE_FILE)
    assert stored[EXPERTS].shape == (5, 70, 75)
    assert stored[f"{EXPERTS}_scale_inv"].shape == (5, 70, 5)
    assert f"{Q_A}_scale_inv" in stored
    assert (hf.unused, hf.config) == ([], RAGGED)
    for name in upstream.names():
        assert np.array_equal(hf.load(name, "f32"), upstream.load(name, "f32")), name
        if hf.source_dtype(name) != "int64":
            assert hf.tensor(name).nbytes == upstream.tensor(name).nbytes


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "scale"])
def test_every_name_of_scales(suffix: str) -> None:
    names = [f"layers.3.attn.wq_a.{suffix}", f"model.layers.3.self_attn.q_a_proj.{suffix}"]
    assert {scaled_weight(name) for name in names} == {"model.layers.3.self_attn.q_a_proj.weight"}
    piece = canonical("layers.3.ffn.experts.7.w3.weight")
    assert scaled_weight(f"layers.3.ffn.experts.7.w3.{suffix}") == piece
    assert scaled_weight(f"model.layers.3.mlp.experts.7.up_proj.{suffix}") == piece
    for name in (
        "layers.3.hc_attn_scale",
        "model.layers.3.attn_hc.scale",
        "hc_head_scale",
        "layers.3.attn.wq_a.weight",
    ):
        assert scaled_weight(name) is None


@pytest.mark.parametrize("naming", ["upstream", "hf"])
def test_slices_and_raw_codes(naming: Any, tmp_path: Path) -> None:
    initialise_native(RAGGED, tmp_path / "native", seed=5, naming=naming)
    checkpoint = Checkpoint.open(tmp_path / "native")
    for name in (EXPERTS, Q_A, Q_B, "lm_head.weight", "model.norm.weight", "model.layers.1.attn_hc.scale"):
        handle, whole = checkpoint.tensor(name), checkpoint.load(name)
        assert (handle.shape, handle.format) == (whole.shape, checkpoint.source_dtype(name))
        assert np.array_equal(handle.read().astype(np.float32), whole.astype(np.float32))
        for start, stop in ((0, 1), (1, 3), (2, 2), (len(whole) - 1, len(whole)), (130, 136)):
            part = handle.read(start, stop)
            assert np.array_equal(part.astype(np.float32), whole[start:stop].astype(np.float32)), (name, start)
    # Raw: gate and up apart or one below the other, as the file has them, and scales for the rows' blocks only.
    matrices = checkpoint.tensor(EXPERTS).matrices(4)
    assert [matrix.rows for matrix in matrices] == ([35, 35] if naming == "upstream" else [70])
    codes = np.concatenate([matrix.codes() for matrix in matrices])
    scales = np.concatenate([matrix.scales() for matrix in matrices])
    assert (codes.shape, scales.shape) == ((70, 75), (70, 5))
    values = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], axis=-1).reshape(70, 150)
    wanted = checkpoint.load(EXPERTS)[4]
    assert np.array_equal(values * np.repeat(E8M0[scales], 32, 1)[:, :150], wanted)
    (matrix,) = checkpoint.tensor(Q_B).matrices()
    assert matrix.codes(127, 136).shape == (9, 37)
    assert matrix.scales(127, 136).shape == (2, 1)
    assert matrix.scales(128, 136).shape == (1, 1)
    assert np.array_equal(matrix.read(127, 136), checkpoint.load(Q_B)[127:136])
    (matrix,) = checkpoint.tensor("lm_head.weight").matrices()
    for read in (matrix.codes, matrix.scales):
        with pytest.raises(UnsupportedError, match=r"lm_head\.weight: expected .*, found BF16"):
            read()
    with pytest.raises(InputError, match="found ids"):
        checkpoint.tensor("model.layers.0.mlp.gate.tid2eid")


def converted(folder: Path, destination: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of a single-file checkpoint with changed tensors."""
    shutil.copytree(folder, destination)
    tensors = load_file(destination / SINGLE_FILE)
    change(tensors)
    save_file(tensors, destination / SINGLE_FILE, {"format": "pt"})
    return destination


def test_other_spellings_of_the_same_bytes(ragged: Path, tmp_path: Path) -> None:
    """Scales as bytes, scales as float32, FP4 in unsigned bytes: the same values."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".scale")]:
            if ".experts." in name:
                tensors[name] = tensors[name].view(torch.uint8)
            else:
                tensors[name] = tensors[name].float()
        for name in [name for name in tensors if tensors[name].dtype == torch.int8]:
            tensors[name] = tensors[name].view(torch.uint8)

    other, plain = Checkpoint.open(converted(ragged, tmp_path / "other", change)), Checkpoint.open(ragged)
    other.check()
    for name in plain.names():
        assert np.array_equal(other.load(name, "f32"), plain.load(name, "f32")), name
    (matrix,) = other.tensor(Q_A).matrices()
    with pytest.raises(UnsupportedError, match="expected E8M0 scales, found F32 scales"):
        matrix.scales()


def test_fp8_experts(ragged: Path, tmp_path: Path) -> None:
    """What the lossless cast of experts to FP8 blocks gives, and F4 that counts its columns."""
    wanted = Checkpoint.open(ragged).load(EXPERTS)
    tensors = load_file(ragged / SINGLE_FILE)
    for expert in range(5):
        for part, rows in (("w1", slice(0, 35)), ("w3", slice(35, 70))):
            name = f"layers.1.ffn.experts.{expert}.{part}"
            values = torch.from_numpy(wanted[expert, rows])
            tensors[f"{name}.weight"] = values.mul(64).to(torch.float8_e4m3fn)
            tensors[f"{name}.scale"] = torch.full((1, 2), 1 / 64).to(torch.float8_e8m0fnu)
    shutil.copytree(ragged, tmp_path / "fp8")
    save_file(tensors, tmp_path / "fp8" / SINGLE_FILE)
    checkpoint = Checkpoint.open(tmp_path / "fp8")
    assert checkpoint.source_dtype(EXPERTS) == "fp8"
    exact = torch.from_numpy(wanted).mul(64).to(torch.float8_e4m3fn).float().div(64)
    assert np.array_equal(checkpoint.load(EXPERTS), exact.numpy())
    assert np.array_equal(checkpoint.tensor(EXPERTS).read(2, 4), exact.numpy()[2:4])


def test_f4_counts_columns(tmp_path: Path) -> None:
    """safetensors' own four-bit type; the header gives the columns, the data half as many bytes."""
    initialise_native(NANO, tmp_path / "native")
    file = tmp_path / "native" / SINGLE_FILE
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for entry in header.values():
        if entry.get("dtype") == "I8":
            entry |= {"dtype": "F4", "shape": [entry["shape"][0], 2 * entry["shape"][1]]}
    wanted = {name: Checkpoint.open(tmp_path / "native").load(name) for name in (EXPERTS, Q_A)}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    checkpoint = Checkpoint.open(tmp_path / "native")
    checkpoint.check()
    for name, value in wanted.items():
        assert np.array_equal(checkpoint.load(name), value)


def test_published_tensors_of_flash() -> None:
    """The index of the published V4-Flash has 69,187 entries: 66,048 of experts, 365 scales of blocks, 1,575 of MTP."""
    flash = preset("v4-flash")
    entries: Counter[str] = Counter()
    for name, info in (tensor_specs(flash) | mtp_specs(flash)).items():
        kind = "mtp" if name.startswith("mtp.") else "experts" if ".experts." in name else "plain"
        pieces = len(sources(flash, name).pieces)
        scaled = native_format(name, info) in ("fp8", "fp4")
        entries[kind] += pieces * (2 if scaled and kind != "plain" else 1)
        entries["scales"] += pieces if scaled and kind == "plain" else 0
    assert entries == {"experts": 66048, "mtp": 1575, "scales": 365, "plain": 1199}
    assert entries.total() == 69187


@pytest.mark.parametrize("config", [NANO, RAGGED, with_engram(RAGGED, heads_per_ngram=2, embed_dim=3, table_rows=20)])
def test_bytes_are_those_of_the_estimate(config: ModelConfig, tmp_path: Path) -> None:
    initialise_native(config, tmp_path / "native", shard_bytes=1 << 20)
    checkpoint = Checkpoint.open(tmp_path / "native")
    checkpoint.check()
    assert checkpoint.total_bytes == weight_bytes(config)
    stored = [t for file in (tmp_path / "native").glob("*.safetensors") for t in read_header(file).values()]
    assert sum(tensor.nbytes for tensor in stored) == weight_bytes(config) + mtp_weight_bytes(config)


def test_mtp_layers(ragged: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(ragged)
    assert set(checkpoint.mtp_specs) == set(mtp_specs(RAGGED))
    assert not set(checkpoint.mtp_specs) & set(checkpoint.names())
    assert len(checkpoint.skipped) == 5 * 3 * 2 + 39
    assert all(is_mtp(RAGGED, name) for name in checkpoint.skipped)
    assert checkpoint.tensor("mtp.0.e_proj.weight").read().shape == (150, 150)
    assert checkpoint.tensor("mtp.0.mlp.experts.gate_up_proj").read(4, 5).shape == (1, 70, 150)
    assert checkpoint.tensor("mtp.0.hc_head.hc_fn").format == "f32"

    def drop(tensors: Tensors) -> None:
        """A drafter of another make has other tensors under the same prefix."""
        del tensors["mtp.0.enorm.weight"]
        tensors["mtp.0.markov_head.w1.weight"] = torch.zeros(2)

    other = Checkpoint.open(converted(ragged, tmp_path / "other", drop))
    other.check()
    assert (other.mtp_specs, other.unused) == ({}, [])
    assert len(other.skipped) == len(checkpoint.skipped)


def set_code(name: str, place: tuple[int, int], code: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(torch.uint8)[place] = code

    return change


def assign(name: str, value: torch.Tensor | None) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


E8, F8 = torch.float8_e8m0fnu, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (assign("layers.1.attn.wq_b.scale", torch.ones(1, 1).to(E8)), r"expected shape \[2, 1\], found \[1, 1\]"),
        (assign("layers.1.attn.wq_b.scale", torch.ones(1, 2).to(E8)), r"expected shape \[2, 1\], found \[1, 2\]"),
        (assign("layers.1.attn.wq_b.scale", torch.ones(2).to(E8)), r"expected shape \[2, 1\], found \[2\]"),
        (assign("layers.1.ffn.experts.2.w2.scale", torch.ones(150, 1).to(E8)), r"expected shape \[150, 2\]"),
        (assign("layers.1.ffn.experts.2.w2.weight", torch.ones(150, 35).to(torch.int8)), r"shape \[150, 18\]"),
        (assign("layers.1.ffn.experts.2.w2.weight", torch.ones(150, 35)), "beside scales, found F32"),
        (assign("layers.1.ffn.experts.2.w2.scale", None), r"experts\.2\.w2\.weight: expected block scales for I8"),
        (assign("layers.1.attn.wq_a.scale", None), r"q_a_proj\.weight: expected block scales for F8_E4M3"),
        (
            assign("layers.1.attn.wq_a.weight", None),
            r"wq_a\.scale: expected the weight it scales beside it, found none",
        ),
        (assign("layers.1.attn.wq_a.scale", torch.ones(1, 2).bfloat16()), "expected one of F8_E8M0, U8, F32"),
        (assign("head.scale", torch.ones(1, 2).to(E8)), r"head\.scale: expected F8_E4M3 or I8 .*, found BF16"),
        (assign("norm.weight", torch.ones(150).to(F8)), r"norm\.weight: expected one of F32, BF16, F16, found F8_E4M3"),
        (assign("layers.1.ffn.experts.9.w1.scale", torch.ones(35, 5).to(E8)), r"experts\.9\.w1\.scale: expected the"),
    ],
)
def test_bad_layouts(change: Callable[[Tensors], None], message: str, ragged: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(converted(ragged, tmp_path / "bad", change))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.check()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_formats_that_are_not_read(ragged: Path, tmp_path: Path) -> None:
    change = assign("layers.1.attn.wq_a.weight", torch.ones(37, 150).to(torch.float8_e5m2))
    with pytest.raises(UnsupportedError, match=r"q_a_proj\.weight: expected F8_E4M3 or I8 .* found F8_E5M2"):
        Checkpoint.open(converted(ragged, tmp_path / "e5m2", change)).check()


def test_experts_of_two_formats(ragged: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["layers.1.ffn.experts.2.w2.weight"] = torch.ones(150, 35).to(F8)
        tensors["layers.1.ffn.experts.2.w2.scale"] = torch.ones(2, 1).to(E8)

    with pytest.raises(CheckpointError, match="expected one dtype for all experts, found F8_E4M3, I8"):
        Checkpoint.open(converted(ragged, tmp_path / "mixed", change)).check()


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (
            set_code("layers.1.attn.wq_b.scale", (1, 0), 0xFF),
            Q_B,
            r"wq_b\.scale: expected scales that are numbers, found the E8M0 code of NaN \(0xff\) at \[1, 0\]",
        ),
        (set_code("layers.1.ffn.experts.3.w3.scale", (34, 4), 0xFF), EXPERTS, r"3\.w3\.scale: .*NaN.* at \[34, 4\]"),
        (set_code("layers.1.attn.wq_b.weight", (130, 5), 0xFF), Q_B, r"wq_b\.weight: .* found nan at \[130, 5\]"),
        (set_code("layers.1.attn.wq_b.scale", (0, 0), 254), Q_B, r"wq_b\.weight: expected finite numbers, found -?inf"),
        (set_code("layers.1.ffn.experts.3.w1.scale", (0, 0), 254), EXPERTS, "expected finite numbers, found -?inf"),
        (
            assign("layers.1.attn.wq_b.scale", torch.tensor([[1.0], [float("inf")]])),
            Q_B,
            "expected finite numbers, found",
        ),
    ],
)
def test_numbers_that_are_none(
    change: Callable[[Tensors], None], name: str, message: str, ragged: Path, tmp_path: Path
) -> None:
    """Found when the data is read, whole or in the slice that holds it."""
    checkpoint = Checkpoint.open(converted(ragged, tmp_path / "bad", change))
    checkpoint.check()
    for read in (lambda: checkpoint.load(name), lambda: checkpoint.tensor(name).read(0, 136)):
        with pytest.raises(CheckpointError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"quantization_config": {"quant_method": "awq"}},
            UnsupportedError,
            "quant_method: expected 'fp8', found 'awq'",
        ),
        ({"quantization_config": {"weight_block_size": [32, 32]}}, UnsupportedError, r"expected \[128, 128\], found"),
        ({"quantization_config": {"fmt": "e5m2"}}, UnsupportedError, "fmt: expected 'e4m3', found 'e5m2'"),
        ({"quantization_config": {"expert_dtype": "int4"}}, UnsupportedError, "expert_dtype: expected 'fp4' or 'fp8'"),
        ({"expert_dtype": "nvfp4"}, UnsupportedError, "expert_dtype: expected 'fp4', 'fp8' or 'bf16', found 'nvfp4'"),
        ({"quantization_config": [1]}, ConfigError, r"quantization_config: expected an object, found \[1\]"),
    ],
)
def test_other_quantisations(
    changes: dict[str, Any], error: type[Exception], message: str, ragged: Path, tmp_path: Path
) -> None:
    shutil.copytree(ragged, tmp_path / "x")
    values = json.loads((ragged / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(error, match=message):
        Checkpoint.open(tmp_path / "x")


def test_published_config() -> None:
    flash = preset("v4-flash")
    values = published_config(flash)
    assert values["compress_ratios"] == [0, 0, 4] + [128, 4] * 20 + [0]
    assert (values["num_hash_layers"], values["expert_dtype"]) == (3, "fp4")
    assert values["quantization_config"]["weight_block_size"] == [128, 128]
    assert "layer_types" not in values
    for config in (flash, preset("v4-pro"), NANO):
        assert ModelConfig.from_dict(json.loads(json.dumps(published_config(config)))) == config
    for changes in ({"csa_ratio": 8}, {"mlp_types": ("topk", "hash", "topk")}):
        with pytest.raises(UnsupportedError, match="published layout: expected ratios 4 and 128 and hash layers first"):
            published_config(replace(RAGGED, **changes))
