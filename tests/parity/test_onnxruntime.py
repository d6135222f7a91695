"""The exported file alone in ONNX Runtime against torch: prompt and decode, every execution mode, aliased caches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import v4c
from tests.parity.onnx_session import decode_differences, empty_caches, metadata, open_session
from tests.parity.reference import StateDictSource, random_hf_config, random_hf_model
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.model.model import V4Model

TOLERANCE = 2e-4
PROMPT, STEPS, CAPACITY = 77, 50, 192


@dataclass
class Case:
    """An exported file, the torch reference's logits for `ids` [B, S], and the model's config."""

    path: Path
    ids: np.ndarray
    expected: np.ndarray


@pytest.fixture(scope="module", params=["random", "engram"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_engram: ModelConfig) -> Case:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    source: StateDictSource | RandomCheckpoint
    if request.param == "random":
        source = StateDictSource.of(random_hf_model(random_hf_config(77), 77))
    else:
        source = RandomCheckpoint(tiny_engram, seed=3)
    v4c.export(source, path)
    ids = np.random.default_rng(7).integers(0, source.config.vocab_size, (2, PROMPT + STEPS))
    expected = V4Model.from_source(source).logits(torch.from_numpy(ids)).numpy()
    return Case(path, ids, expected)


def steps(case: Case) -> list[tuple[int, int]]:
    """(start, length) of a prompt in two chunks, then single tokens."""
    return [(0, 50), (50, PROMPT - 50)] + [(PROMPT + i, 1) for i in range(STEPS)]


@pytest.mark.parametrize("optimise", [True, False])
@pytest.mark.parametrize("parallel", [False, True])
def test_separate_caches(case: Case, parallel: bool, optimise: bool) -> None:
    session, caches = open_session(case.path, parallel, optimise), empty_caches(case.path, 2, CAPACITY)
    for start, length in steps(case)[: 12 if not optimise else None]:
        feed = {
            "input_ids": case.ids[:, start : start + length],
            "positions": np.full(2, start),
            "lengths": np.full(2, length),
        }
        logits, *present = session.run(None, feed | caches)
        caches = dict(zip(caches, present, strict=True))
        assert np.abs(logits - case.expected[:, start + length - 1]).max() <= TOLERANCE


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("optimise", [True, False])
def test_aliased_caches(case: Case, parallel: bool, optimise: bool) -> None:
    """One buffer as past and present."""
    session = open_session(case.path, parallel, optimise)
    buffers = {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in empty_caches(case.path, 2, CAPACITY).items()}
    for start, length in steps(case)[: 12 if not optimise else None]:
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(case.ids[:, start : start + length]))
        binding.bind_cpu_input("positions", np.full(2, start))
        binding.bind_cpu_input("lengths", np.full(2, length))
        binding.bind_output("logits")
        for name, value in buffers.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past", "present"), value)
        session.run_with_iobinding(binding)
        logits = binding.get_outputs()[0].numpy()
        assert np.abs(logits - case.expected[:, start + length - 1]).max() <= TOLERANCE


def test_rows_at_different_positions(case: Case) -> None:
    session, caches = open_session(case.path), empty_caches(case.path, 2, CAPACITY)
    rng, position = np.random.default_rng(5), np.zeros(2, np.int64)
    while (position < PROMPT).any():
        lengths = np.minimum(rng.integers(0, 20, 2), PROMPT - position)
        ids = np.zeros((2, 20), np.int64)
        for row in range(2):
            ids[row, : lengths[row]] = case.ids[row, position[row] : position[row] + lengths[row]]
        feed = {"input_ids": ids, "positions": position, "lengths": lengths}
        logits, *present = session.run(None, feed | caches)
        caches = dict(zip(caches, present, strict=True))
        position = position + lengths
        for row in np.flatnonzero(lengths):
            assert np.abs(logits[row] - case.expected[row, position[row] - 1]).max() <= TOLERANCE


def test_checker_and_strict_shape_inference(case: Case) -> None:
    onnx.checker.check_model(str(case.path), full_check=True)
    model = onnx.load(case.path, load_external_data=False)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert next(o.version for o in model.opset_import if o.domain == "") >= 23


def test_one_named_node_per_custom_op(case: Case) -> None:
    model = onnx.load(case.path, load_external_data=False)
    config = ModelConfig.from_dict(json.loads(metadata(case.path, "v4c.config")))
    bodies = {f.name: f for f in model.functions if f.domain == "v4c.parts"}
    counts: dict[str, int] = {}
    for call in model.graph.node:
        for node in bodies[call.op_type].node if call.domain == "v4c.parts" else []:
            if node.domain == "v4c":
                assert node.name
                counts[node.op_type] = counts.get(node.op_type, 0) + 1
    layers, csa = config.num_hidden_layers, len(config.layers_of("csa"))
    assert counts["CompressedSparseAttention"] == counts["LightningIndex"] == csa
    assert counts["HeavilyCompressedAttention"] == len(config.layers_of("hca"))
    assert counts["MHCPre"] == counts["MHCPost"] == 2 * layers
    assert counts["GroupedExperts"] == layers
    assert counts["MHCHead"] == 1
    assert counts.get("EngramHash", 0) == (len(config.engram.layer_ids) if config.engram else 0)


def test_no_machine_paths_in_the_file(case: Case) -> None:
    data = case.path.read_bytes()
    assert b"site-packages" not in data
    assert b"/home/" not in data
    assert str(Path(v4c.__file__).parent).encode() not in data


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "BFLOAT16"), ("f16", "FLOAT16")])
def test_half_precision_storage(tiny_config: ModelConfig, tmp_path: Path, dtype: str, stored: str) -> None:
    """Matrices are stored in half precision, everything else as it was, and the arithmetic is float32's on them."""
    source = RandomCheckpoint(tiny_config, seed=4)
    v4c.export(source, tmp_path / "m.onnx", dtype=dtype)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    kinds = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
    assert kinds["lm_head.weight"] == kinds["model.layers.1.mlp.experts.down_proj"] == stored
    assert kinds["model.layers.1.self_attn.sinks"] == kinds["model.norm.weight"] == "FLOAT"
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float16

    class Rounded(RandomCheckpoint):
        def load(self, name: str, dtype: str | None = None) -> np.ndarray:
            array = super().load(name, dtype)
            return torch.from_numpy(array).to(torch_dtype).float().numpy() if kinds[name] == stored else array

    ids = np.random.default_rng(8).integers(0, tiny_config.vocab_size, (2, 90))
    expected = V4Model.from_source(Rounded(tiny_config, seed=4)).logits(torch.from_numpy(ids)).numpy()
    assert decode_differences(tmp_path / "m.onnx", ids, expected, prompt=70) <= TOLERANCE
