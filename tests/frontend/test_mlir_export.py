"""MLIR export: the file run by IREE against torch, its two spellings of weights, and the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import v4c
from tests.parity.iree_session import IreeSession, header
from tests.parity.margins import choices_are_clear
from tests.v4c.cli_harness import V4C, assert_one_line, invoke
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.model.model import V4Model
from v4c.frontend.presets import preset
from v4c.inspection import inspect

REASON = "needs the extra mlir: pip install 'v4c[mlir]'"
TOLERANCE = 2e-4  # logits have a standard deviation near 1
PROMPT, TOTAL, CAPACITY = 133, 150, 192
UPSTREAM = {"affine", "arith", "cf", "func", "linalg", "math", "tensor"}


class Rounded(RandomCheckpoint):
    """Random weights of which those that an export stores in bfloat16 are rounded to it."""

    def load(self, name: str, dtype: str | None = None) -> np.ndarray:
        from v4c.frontend.names import tensor_specs
        from v4c.frontend.onnx_export import WEIGHT_DTYPES, stored_dtype

        array = super().load(name, dtype)
        kept = stored_dtype(name, tensor_specs(self.config)[name], WEIGHT_DTYPES["bf16"]) != WEIGHT_DTYPES["bf16"]
        return array if kept else torch.from_numpy(array).bfloat16().float().numpy()


@dataclass
class Case:
    """An exported file in IREE, the ids ``[B, S]`` it is given and the torch reference's logits ``[B, S, V]``."""

    path: Path
    config: ModelConfig
    session: IreeSession
    ids: np.ndarray
    expected: np.ndarray

    def check(self, start: int, length: int) -> None:
        """Logits of the chunk's last token, all rows at one position."""
        logits = self.session.step(self.ids[:, start : start + length], start, length)
        assert np.abs(logits - self.expected[:, start + length - 1]).max() <= TOLERANCE


def make_case(folder: Path, config: ModelConfig, kind: type[RandomCheckpoint], dtype: str) -> Case:
    pytest.importorskip("torch_mlir", reason=REASON)
    pytest.importorskip("iree.compiler", reason=REASON)
    ids = np.random.default_rng(7).integers(0, config.vocab_size, (2, TOTAL))
    source = next(s for s in (kind(config, seed) for seed in range(20)) if choices_are_clear(s, ids))
    expected = V4Model.from_source(source).logits(torch.from_numpy(ids)).numpy()
    assert 0.3 < expected.std() < 3
    path = folder / "model.mlir"
    v4c.export(source, path, format="mlir", dtype=dtype)
    return Case(path, config, IreeSession(path, 2, CAPACITY), ids, expected)


@pytest.fixture(scope="module")
def small(tiny_engram: ModelConfig) -> ModelConfig:
    """Two layers that have CSA, HCA, both routers and Engram; few iterations keep compiling short."""
    assert tiny_engram.engram is not None
    return replace(
        tiny_engram,
        num_hidden_layers=2,
        attention_types=("hca", "csa"),
        mlp_types=("hash", "topk"),
        hc_sinkhorn_iters=3,
        engram=replace(tiny_engram.engram, layer_ids=(1,)),
    )


@pytest.fixture(scope="module")
def case(small: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("mlir"), small, RandomCheckpoint, "f32")


def test_prompt_and_decode(case: Case) -> None:
    """Fresh caches hold NaN: nothing may be read that was not written."""
    case.session.reset(2, CAPACITY, np.nan)
    for start, length in [(0, 50), (50, PROMPT - 50)] + [(t, 1) for t in range(PROMPT, TOTAL)]:
        case.check(start, length)


def test_rows_at_different_positions(case: Case) -> None:
    """Chunks of different lengths in one batch, idle rows and padding among them."""
    case.session.reset(2, CAPACITY)
    rng, position = np.random.default_rng(5), np.zeros(2, np.int64)
    while (position < PROMPT).any():
        lengths = np.minimum(rng.integers(0, 40, 2), PROMPT - position)
        ids = np.full((2, 40), 3, np.int64)
        for row in range(2):
            ids[row, : lengths[row]] = case.ids[row, position[row] : position[row] + lengths[row]]
        logits = case.session.step(ids, position, lengths)
        position = position + lengths
        for row in np.flatnonzero(lengths):
            assert np.abs(logits[row] - case.expected[row, position[row] - 1]).max() <= TOLERANCE


@pytest.mark.parametrize("batch", [1, 3])
def test_other_batches_and_capacities(case: Case, batch: int) -> None:
    """Nothing of the sizes that were traced is in the module."""
    case.session.reset(batch, 64)
    ids = np.concatenate([case.ids, case.ids[:1]])[:batch]
    expected = np.concatenate([case.expected, case.expected[:1]])[:batch]
    assert np.abs(case.session.step(ids[:, :9], 0, 9) - expected[:, 8]).max() <= TOLERANCE
    assert np.abs(case.session.step(ids[:, 9:10], 9, 1) - expected[:, 9]).max() <= TOLERANCE


def test_without_weights_the_same_graph_in_upstream_dialects(case: Case, tmp_path: Path) -> None:
    """By the command, from a checkpoint; also: two processes write the same text."""
    from v4c.frontend.checkpoint import Checkpoint
    from v4c.frontend.initialise import initialise

    initialise(case.config, tmp_path / "checkpoint", seed=1)
    path = tmp_path / "graph.mlir"
    command = [V4C, "export", "-m", tmp_path / "checkpoint", "--format", "mlir", "--no-weights", "-o", path]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "graph.mlir"]

    left_out, stored = inspect(path), inspect(case.path)
    assert left_out["problem"] is stored["problem"] is None
    assert set(left_out["ops"]) == UPSTREAM
    assert set(stored["ops"]) == UPSTREAM | {"util"}
    assert not left_out["weights"]["stored"]
    assert left_out["weights"]["bytes"] == stored["weights"]["bytes"] == sum(stored["weights"]["files"].values())
    for key in ("inputs", "outputs", "caches", "weights", "config"):
        if key != "config":  # the checkpoint's says how it is stored
            assert header(path, key) == header(case.path, key)
    marker = "\n  func.func private @"
    assert path.read_text().partition(marker)[2] == case.path.read_text().partition(marker)[2]
    names = header(path, "weights")
    assert set(names) <= set(Checkpoint.open(tmp_path / "checkpoint").names()) | {"model.engram_lookup"}
    arguments = path.read_text().partition("func.func @main(\n")[2].partition("\n  ) ->")[0].splitlines()
    assert [line.split(":")[0].strip(" %") for line in arguments][-len(names) :] == names


def test_inspect(case: Case) -> None:
    description = inspect(case.path)
    assert description["kind"] == "mlir"
    assert description["config"]["layers"] == 2
    main = description["entry_points"]["main"]
    assert main["inputs"][:2] == [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "chunk"]},
        {"name": "positions", "dtype": "int64", "shape": ["batch"]},
    ]
    assert main["outputs"][0] == {"name": "logits", "dtype": "float32", "shape": ["batch", case.config.vocab_size]}
    assert len(main["inputs"]) - 3 == len(main["outputs"]) - 1 == len(description["caches"])
    assert description["functions"]["MHCPre"] == 4
    assert description["functions"]["CompressedSparseAttention"] == 1
    calls = description["ops"]["linalg"]["linalg.generic"]
    assert calls["calls"] > calls["nodes"] > 100
    assert description["weights"]["files"] == {"model.mlir.safetensors": description["weights"]["bytes"]}
    shown = invoke("inspect", case.path)
    assert (shown.exit_code, shown.stderr) == (0, "")
    for text in ("batch x chunk", "linalg", "MHCPre", "weights in", "1M "):
        assert text in shown.stdout


def test_inspect_finds_missing_and_damaged_weights(case: Case, tmp_path: Path) -> None:
    path, weights = tmp_path / "model.mlir", tmp_path / "model.mlir.safetensors"
    shutil.copy(case.path, path)
    assert "found no such file" in inspect(path)["problem"]
    weights.write_bytes(case.path.with_name("model.mlir.safetensors").read_bytes()[:-1])
    assert inspect(path)["problem"] is not None
    shutil.copy(case.path.with_name("model.mlir.safetensors"), weights)
    assert inspect(path)["problem"] is None
    path.write_text(path.read_text().replace(f"tensor<{case.config.vocab_size}x64xf32>", "tensor<7x64xf32>"))
    assert "expected float32 [7, 64]" in inspect(path)["problem"]


def test_no_machine_paths(case: Case) -> None:
    text = case.path.read_text()
    assert "site-packages" not in text
    assert str(Path(v4c.__file__).parent) not in text


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir", None)
    result = invoke("export", "--preset", "v4-nano", "--format", "mlir", "-o", tmp_path / "m.mlir")
    assert_one_line(result, "torch-mlir", "pip install 'v4c[mlir]'")
    assert list(tmp_path.iterdir()) == []


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(v4c.UnsupportedError, match="format 'tosa': expected one of onnx, mlir"):
        v4c.export(preset("v4-nano"), tmp_path / "m.mlir", format="tosa")
    with pytest.raises(v4c.UnsupportedError, match="dtype 'int4'"):
        v4c.export(preset("v4-nano"), tmp_path / "m.mlir", format="mlir", dtype="int4")
    with pytest.raises(v4c.OutputError, match="found a folder"):
        v4c.export(preset("v4-nano"), tmp_path, format="mlir")
    with pytest.raises(v4c.OutputError, match="expected an existing folder"):
        v4c.export(preset("v4-nano"), tmp_path / "none" / "m.mlir", format="mlir")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_cannot_be_read_leaves_nothing_behind(small: ModelConfig, tmp_path: Path) -> None:
    pytest.importorskip("torch_mlir", reason=REASON)
    from v4c.frontend.mlir.export import save
    from v4c.frontend.mlir.module import Module

    class Failing(RandomCheckpoint):
        def load(self, name: str, dtype: str | None = None) -> np.ndarray:
            raise v4c.CheckpointError(f"{name}: expected data, found none")

    module = Module(small, False, weights={"model.norm.weight": "tensor<64xf32>"})
    with pytest.raises(v4c.CheckpointError, match=r"model\.norm\.weight"):
        save(module, tmp_path / "m.mlir", Failing(small, 0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_nano(tmp_path: Path, dtype: str) -> None:
    """The preset v4-nano with Engram, weights in float32 and in bfloat16."""
    kind = Rounded if dtype == "bf16" else RandomCheckpoint
    nano = make_case(tmp_path, preset("v4-nano-engram"), kind, dtype)
    for start, length in [(0, 100), (100, PROMPT - 100)] + [(t, 1) for t in range(PROMPT, TOTAL)]:
        nano.check(start, length)
    assert inspect(nano.path)["problem"] is None


@pytest.mark.slow
def test_logits_of_every_token_and_weights_as_arguments(small: ModelConfig, tmp_path: Path) -> None:
    pytest.importorskip("torch_mlir", reason=REASON)
    pytest.importorskip("iree.compiler", reason=REASON)
    source, path = RandomCheckpoint(small, 0), tmp_path / "all.mlir"
    v4c.export(source, path, format="mlir", weights=False, all_logits=True)
    ids = np.random.default_rng(3).integers(0, small.vocab_size, (2, 40))
    expected = V4Model.from_source(source).logits(torch.from_numpy(ids)).numpy()
    weights = tuple(np.ascontiguousarray(source.load(name)) for name in header(path, "weights"))
    logits = IreeSession(path, 2, 64).step(ids, 0, 40, weights)
    assert np.abs(logits - expected).max() <= TOLERANCE
