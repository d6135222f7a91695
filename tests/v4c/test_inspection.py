"""`v4c.inspect` against independent counts: safetensors' own reader, and ONNX's inliner."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, inliner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import v4c
from v4c.custom_ops import DOMAIN
from v4c.errors import CheckpointError, ConfigError, InputError
from v4c.frontend import estimate
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import initialise
from v4c.frontend.names import tensor_specs
from v4c.frontend.presets import PRESETS
from v4c.inspection import CONTEXTS, costs, inspect, part_of
from v4c.inspection_onnx import OPS_DOMAIN
from v4c.runtime.artifact import read_manifest


def test_checkpoint(tiny_checkpoint: Path, tiny_config: ModelConfig) -> None:
    description = inspect(tiny_checkpoint)
    json.dumps(description, allow_nan=False)
    assert (description["kind"], description["problem"]) == ("checkpoint", None)
    file = tiny_checkpoint / "model.safetensors"
    sizes: Counter[str] = Counter()
    with safe_open(file, framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118  it is no dictionary
            tensor = opened.get_tensor(name)
            sizes[{"float32": "F32", "int64": "I64"}[tensor.dtype.name]] += tensor.nbytes
        assert description["tensors"] == len(opened.keys())
    assert description["bytes_by_dtype"] == sizes
    assert description["bytes"] == sizes.total() == sum(description["bytes_by_part"].values())
    assert description["files"] == {file.name: file.stat().st_size}
    assert description["bytes_by_part"]["routed experts"] == 3 * 8 * (3 * 32 * 64) * 4
    assert "other" not in description["bytes_by_part"]
    assert description["tokenizer"] is True
    assert description["config"]["attention"] == {"sliding": 1, "csa": 1, "hca": 1}
    assert description["costs"] == costs(tiny_config)
    assert v4c.inspect is inspect


def test_costs_are_those_of_the_estimate(tiny_config: ModelConfig) -> None:
    figures = costs(tiny_config)
    assert CONTEXTS == (4 * 1024, 128 * 1024, 1024 * 1024)
    assert figures["parameters"] == estimate.parameters(tiny_config)
    for context in CONTEXTS:
        assert figures["flops_per_token"][str(context)] == estimate.flops_per_token(tiny_config, context)
        assert figures["cache_bytes"]["fp8"][str(context)] == estimate.cache_bytes(tiny_config, context, "fp8")
    assert list(figures["cache_bytes"]) == ["f32", "bf16", "fp8"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_belongs_to_a_part(name: str) -> None:
    parts = Counter(part_of(tensor) for tensor in tensor_specs(PRESETS[name]))
    assert "other" not in parts
    assert parts["norms"] == 1 + 2 * PRESETS[name].num_hidden_layers
    assert ("engram" in parts) == name.endswith("-engram")
    assert part_of("model.layers.3.ffn.experts.7.w1.weight") == "routed experts"


def test_sharded_checkpoint_with_single_experts(
    tiny_config: ModelConfig, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    initialise(tiny_config, tmp_path / "sharded", seed=7, shard_bytes=1 << 16)
    description, whole = inspect(tmp_path / "sharded"), inspect(tiny_checkpoint)
    assert len(description["files"]) > 3
    assert description["bytes_by_part"] == whole["bytes_by_part"]
    assert description["tensors"] > whole["tensors"]


def test_checkpoint_that_cannot_be_compiled_is_described(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = np.zeros((320, 64), np.int8)
    tensors["stray"] = np.zeros(3, np.float32)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    description = inspect(folder)
    assert "lm_head.weight" in description["problem"] or "model.norm.weight" in description["problem"]
    assert description["bytes_by_dtype"]["I8"] == 320 * 64
    assert description["unused_tensors"] == ["stray"]
    assert description["bytes_by_part"]["other"] == 12


def test_onnx_counts_are_those_of_the_inlined_graph(tiny_onnx: Path) -> None:
    description = inspect(tiny_onnx)
    json.dumps(description, allow_nan=False)
    assert (description["kind"], description["problem"]) == ("onnx", None)
    assert OPS_DOMAIN == DOMAIN
    model = onnx.load(tiny_onnx, load_external_data=False)
    bodies = [(function.domain, function.name) for function in model.functions if function.domain == DOMAIN]
    inlined = inliner.inline_selected_functions(model, bodies, exclude=True)
    expected = Counter(node.op_type for node in inlined.graph.node if node.domain == DOMAIN)
    assert {name: count["calls"] for name, count in description["custom_ops"].items()} == expected
    standard = Counter(node.op_type for node in inlined.graph.node if node.domain == "")
    assert {name: count["calls"] for name, count in description["standard_ops"].items()} == standard
    assert expected["KVCompress"] == 3  # CSA: rows and index rows; HCA: rows
    assert expected["HashRoute"] == 1
    assert description["functions"] == {
        "Embed": 1,
        "Head": 1,
        "SlidingHashLayer": 1,
        "CSATopKLayer": 1,
        "HCATopKLayer": 1,
    }


def test_onnx_inputs_caches_and_weights(tiny_onnx: Path, tiny_config: ModelConfig) -> None:
    description = inspect(tiny_onnx)
    names = [value["name"] for value in description["inputs"]]
    assert names[:3] == ["input_ids", "positions", "lengths"]
    assert names[3:] == [f"past.{cache['name']}" for cache in description["caches"]]
    assert description["inputs"][3] == {"name": "past.0.window", "dtype": "float32", "shape": ["batch", 128, 32]}
    assert description["outputs"][0] == {"name": "logits", "dtype": "float32", "shape": ["batch", 320]}
    sizes: Counter[str] = Counter()
    for name, info in tensor_specs(tiny_config).items():
        kind = "fp32" if name.endswith("mlp.gate.weight") else info.kind  # routers are never rounded
        dtype, width = {"weight": ("bfloat16", 2), "fp32": ("float32", 4), "int64": ("int64", 8)}[kind]
        sizes[dtype] += width * info.size
    weights = description["weights"]
    assert weights["bytes_by_dtype"] == sizes
    assert (weights["tensors"], weights["stored"]) == (len(tensor_specs(tiny_config)), True)
    assert list(weights["files"]) == ["tiny.onnx.data"]
    assert description["opsets"]["ai.onnx"] == 23
    assert description["costs"] == costs(tiny_config)


def test_onnx_without_its_data(tiny_onnx: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_onnx, tmp_path / "m.onnx")
    assert "tiny.onnx.data: expected" in inspect(tmp_path / "m.onnx")["problem"]
    shutil.copy(f"{tiny_onnx}.data", tmp_path / "tiny.onnx.data")
    assert inspect(tmp_path / "m.onnx")["problem"] is None
    os.truncate(tmp_path / "tiny.onnx.data", 5000)
    assert "found 5000" in inspect(tmp_path / "m.onnx")["problem"]


def test_onnx_without_weights(tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx, load_external_data=False)
    names = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "v4c.weights"))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    model.graph.input.extend(helper.make_tensor_value_info(n, stored[n].data_type, stored[n].dims) for n in names)
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensor for name, tensor in stored.items() if name not in names)
    onnx.save(model, tmp_path / "m.onnx")
    bare, whole = inspect(tmp_path / "m.onnx"), inspect(tiny_onnx)
    assert bare["inputs"] == whole["inputs"]
    assert bare["weights"] == whole["weights"] | {"stored": False, "files": {}}


def test_onnx_of_others(tmp_path: Path) -> None:
    twice = helper.make_function(
        "f", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 23)]
    )
    body = helper.make_graph([helper.make_node("Twice", ["x"], ["b"], domain="f")], "then", [], [
        helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])])  # fmt: skip
    nodes = [
        helper.make_node("Twice", ["x"], ["a"], domain="f"),
        helper.make_node("If", ["c"], ["d"], then_branch=body, else_branch=body),
        helper.make_node("Mul", ["d", "w"], ["y"]),
        helper.make_node("FusedThing", ["y"], ["z"], domain="com.other"),
    ]
    value = helper.make_tensor_value_info
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1, 2])
    graph = helper.make_graph(nodes, "g", [value("x", 1, [2]), value("c", 9, [])], [value("z", 1, ["n"])], [weight])
    onnx.save(helper.make_model(graph, functions=[twice]), tmp_path / "m.onnx")
    description = inspect(tmp_path / "m.onnx")
    assert "config" not in description
    assert description["custom_ops"] == {}
    assert description["functions"] == {"Twice": 3}
    assert {name: count["calls"] for name, count in description["standard_ops"].items()} == {
        "Add": 3, "If": 1, "Mul": 1, "com.other.FusedThing": 1,
    }  # fmt: skip
    assert description["weights"]["bytes"] == 8
    assert [value["dtype"] for value in description["inputs"]] == ["float32", "bool"]
    assert description["outputs"][0]["shape"] == ["n"]


def test_onnx_functions_that_call_themselves(tmp_path: Path) -> None:
    functions = [
        helper.make_function("f", name, ["x"], ["y"], [helper.make_node(other, ["x"], ["y"], domain="f")], [])
        for name, other in (("A", "B"), ("B", "A"))
    ]
    value = helper.make_tensor_value_info
    node = helper.make_node("A", ["x"], ["y"], domain="f")
    graph = helper.make_graph([node], "g", [value("x", 1, [2])], [value("y", 1, [2])])
    onnx.save(helper.make_model(graph, functions=functions), tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match="function A: expected no recursion"):
        inspect(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"# text\n" * 100])
def test_files_that_are_no_onnx(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m.onnx: expected an ONNX model, found"):
        inspect(tmp_path / "m.onnx")


@pytest.mark.parametrize(("key", "text"), [("v4c.config", "{"), ("v4c.config", "[]"), ("v4c.weights", '"w"')])
def test_damaged_onnx_metadata(key: str, text: str, tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx, load_external_data=False)
    next(entry for entry in model.metadata_props if entry.key == key).value = text
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match=f"metadata {key}: expected"):
        inspect(tmp_path / "m.onnx")


def test_artifact(tiny_artifact: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    description = inspect(tiny_artifact)
    json.dumps(description, allow_nan=False)
    assert (description["kind"], description["problem"]) == ("artifact", None)
    assert description["files"] == {
        file.name: file.stat().st_size for file in tiny_artifact.iterdir() if file.name != "manifest.json"
    }
    assert set(description["entry_points"]) == {"prefill", "prefill_all", "decode", "decode_one"}
    assert description["bytes"] == sum(weight.nbytes for weight in read_manifest(tiny_artifact).weights)
    assert description["costs"] == costs(tiny_config)
    assert description["target"]["name"].startswith("cpu")
    assert (description["tokenizer"], description["has_weights"], description["mtp"]) == (True, True, False)

    shutil.copytree(tiny_artifact, tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "weights-00001.safetensors", 100)
    assert "found 100" in inspect(tmp_path / "damaged")["problem"]
    (tmp_path / "damaged" / "weights-00001.safetensors").unlink()
    assert "found no such file" in inspect(tmp_path / "damaged")["problem"]


def test_nothing_to_inspect(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found nothing"):
        inspect(tmp_path / "none")
    with pytest.raises((CheckpointError, ConfigError), match=r"config\.json"):
        inspect(tmp_path)
