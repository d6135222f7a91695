"""Packing in slices: the same bytes as packing whole, in memory that follows the slice, and resumable after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import v4c
from tests.runtime import fake_model
from v4c import weight_packing
from v4c.compiler import _packed, graph, lower, storage_of
from v4c.errors import CheckpointError
from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.initialise_native import initialise_native
from v4c.frontend.names import tensor_specs
from v4c.onnx_source import OnnxSource
from v4c.passes.pipeline import PassOptions
from v4c.passes.relax.layouts import Layout, WeightSpec
from v4c.runtime.artifact import Artifact
from v4c.runtime.writer import ArtifactWriter
from v4c.targets.cpu.target import CPUTarget
from v4c.weight_packing import pack_weights, peak_bytes, resume_key, slices

DEVICE = CPUTarget.parse("x86-64")
ROOT = Path(__file__).parents[2]


class Arrays:
    """A source of arrays that counts how often each is asked for."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays
        self.loads: list[str] = []

    def load(self, name: str, dtype: str | None = None) -> np.ndarray:
        self.loads.append(name)
        return self.arrays[name]


def spec(layout: Layout, shape: tuple[int, ...], dtype: str, groups: int = 1, rows: tuple[int, ...] = ()) -> WeightSpec:
    parts = tuple((f"w{i}", (count, *shape[1:])) for i, count in enumerate(rows))
    return WeightSpec("w", layout, shape, groups, dtype, parts)


CASES = [
    (Layout.PLAIN, (9,), 1, ()),
    (Layout.PLAIN, (3, 4, 5), 1, ()),
    (Layout.TABLE, (70, 40), 1, ()),
    (Layout.ROWS, (70, 40), 1, ()),
    (Layout.LINEAR, (131, 70), 1, ()),
    (Layout.LINEAR, (150, 40), 1, (70, 33, 47)),  # every part starts a panel of its own
    (Layout.LINEAR_KN, (70, 131), 1, ()),
    (Layout.ROUTER, (45, 64), 1, ()),
    (Layout.GROUPED_LINEAR, (3 * 37, 70), 3, ()),
    (Layout.GATE_UP, (5, 2 * 37, 70), 1, ()),
    (Layout.GATE_UP, (2 * 37, 70), 1, (37, 37)),
    (Layout.EXPERTS_DOWN, (5, 70, 37), 1, ()),
    (Layout.EXPERTS_DOWN, (70, 37), 1, ()),
]


@pytest.mark.parametrize("slice_bytes", [1, 5000, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("layout", "shape", "groups", "rows"), CASES)
def test_slices_are_the_whole(
    layout: Layout,
    shape: tuple[int, ...],
    groups: int,
    rows: tuple[int, ...],
    dtype: str,
    slice_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products = (Layout.LINEAR, Layout.LINEAR_KN, Layout.GROUPED_LINEAR, Layout.GATE_UP, Layout.EXPERTS_DOWN)
    if dtype in ("int8", "int4") and layout not in products:
        dtype = "float32"  # nothing else is quantised
    monkeypatch.setattr(weight_packing, "SLICE_BYTES", slice_bytes)
    weight = spec(layout, shape, dtype, groups, rows)
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    whole = DEVICE.pack(weight, array)
    cuts = np.split(array, np.cumsum(weight.sizes)[:-1]) if rows else [array]
    source = Arrays(**dict(zip((name for name, _ in weight.tensors), cuts, strict=True)))
    reader = weight_packing._Reader(source)
    found = list(slices(DEVICE, weight))
    assert {name for part in found for name in part.tensors} == {name for name, _ in weight.tensors}
    packed = [DEVICE.pack(part.weight, reader.read(weight, part)) for part in found]
    for part, one in zip(found, packed, strict=True):
        expected = DEVICE.kernels.packed(part.weight)
        assert (tuple(expected.shape), expected.dtype) == (one.shape, str(one.dtype))
    joined = np.concatenate(packed) if shape else packed[0]
    assert joined.tobytes() == whole.tobytes()
    assert joined.shape == whole.shape
    assert len(source.loads) == len(set(source.loads)) == len(cuts)  # each tensor once
    if layout in (Layout.TABLE, Layout.LINEAR) and not rows:
        assert len(found) == {1: 70 if layout == Layout.TABLE else 5, 5000: 3 if layout == Layout.TABLE else 5}.get(
            slice_bytes, 1
        )


def test_ids_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_packing, "SLICE_BYTES", 1)
    table = replace(spec(Layout.TABLE, (70, 6), "int64"), name="ids")
    assert len(list(slices(DEVICE, table))) == 1


def test_a_source_of_the_wrong_shape() -> None:
    weight = spec(Layout.LINEAR, (4, 3), "float32")
    (part,) = slices(DEVICE, weight)
    with pytest.raises(CheckpointError, match=r"w: expected shape \[4, 3\], found \[3, 4\]"):
        weight_packing._Reader(Arrays(w=np.zeros((3, 4)))).read(weight, part)


def test_peak_memory_does_not_grow_with_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --dry-run prints: a terabyte's largest tensor of 68 GB is packed in the memory of one expert."""
    stack = spec(Layout.GATE_UP, (384, 6144, 7168), "float32")
    table = spec(Layout.TABLE, (129280, 7168), "bfloat16")
    assert peak_bytes(DEVICE, [stack, table]) < 2 << 30
    assert peak_bytes(DEVICE, [stack, table]) == peak_bytes(DEVICE, [replace(stack, shape=(1, 6144, 7168)), table])
    assert peak_bytes(DEVICE, []) < peak_bytes(DEVICE, [table])


def test_keys_tell_sources_and_packings_apart(tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    checkpoint, device = Checkpoint.open(tiny_checkpoint), DEVICE
    weights = [spec(Layout.LINEAR, (4, 3), "float32")]
    key = resume_key(checkpoint, device, weights, [])
    assert key == resume_key(Checkpoint.open(tiny_checkpoint), device, weights, [])
    others = [
        resume_key(checkpoint, CPUTarget.parse("x86-64-v3"), weights, []),
        resume_key(checkpoint, device, [replace(weights[0], dtype="bfloat16")], []),
        resume_key(RandomCheckpoint(tiny_config, 0), device, weights, []),
        resume_key(RandomCheckpoint(tiny_config, 1), device, weights, []),
    ]
    file = tiny_checkpoint / "model.safetensors"
    before = file.stat()
    try:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        others.append(resume_key(checkpoint, device, weights, []))
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len({key, *others}) == 6
    assert resume_key(Arrays(), device, weights, []) is None


def written(source: Any, destination: Path, weights: list[WeightSpec], progress: Any = None) -> Path:
    """An artifact of these weights, in the way a compilation writes it."""
    packed = _packed(DEVICE, weights)
    with ArtifactWriter(destination) as writer:
        writer.write_library(b"no code")
        writer.declare_weights(packed, resume_key=resume_key(source, DEVICE, weights, packed))
        pack_weights(writer, source, DEVICE, weights, packed, progress)
        writer.finish(fake_model.manifest())
    return destination


# The same in a process of its own, which is killed before its slice `die`, and says how far its memory grew.
CHILD = """
import json, os, re, signal, sys
from pathlib import Path
from v4c import weight_packing
from v4c.frontend.checkpoint import Checkpoint
from v4c.onnx_source import OnnxSource
from v4c.passes.pipeline import PassOptions
from v4c.passes.relax.layouts import Layout, WeightSpec
from tests.v4c.test_weight_packing import DEVICE, written

def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

def tuples(value):
    return tuple(map(tuples, value)) if isinstance(value, list) else value

source, destination, slice_bytes, die = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
weight_packing.SLICE_BYTES = slice_bytes
described = [{key: tuples(value) for key, value in weight.items()} for weight in json.load(sys.stdin)]
weights = [WeightSpec(**{**weight, "layout": Layout(weight["layout"])}) for weight in described]
seen = 0

def progress(what, done, total):
    global seen
    seen += 1
    if seen == die:
        os.kill(os.getpid(), signal.SIGKILL)

Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
start = memory("VmRSS")
written(Checkpoint.open(source), Path(destination), weights, progress)
print(start, memory("VmHWM"), seen)
"""


def child(
    source: Path, destination: Path, weights: list[WeightSpec], slice_bytes: int, die: int = 0
) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", CHILD, str(source), str(destination), str(slice_bytes), str(die)]
    described = json.dumps([asdict(weight) for weight in weights])
    return subprocess.run(arguments, input=described, capture_output=True, text=True, timeout=300, cwd=ROOT)


def plain_weights(config: ModelConfig) -> list[WeightSpec]:
    """Weights of a model, one per tensor, packed by what they are."""
    layouts = {
        "gate_up_proj": Layout.GATE_UP,
        "experts.down_proj": Layout.EXPERTS_DOWN,
        "embed_tokens.weight": Layout.TABLE,
    }
    found = []
    for name, info in tensor_specs(config).items():
        layout = next((layout for end, layout in layouts.items() if name.endswith(end)), None)
        product = info.kind == "weight" and len(info.shape) == 2
        dtype = "int64" if info.kind == "int64" else "float32"
        found.append(WeightSpec(name, layout or (Layout.LINEAR if product else Layout.PLAIN), info.shape, 1, dtype))
    return found


def test_memory_follows_the_slice(tiny_config: ModelConfig, tmp_path: Path) -> None:
    """A model of 400 MB as float32, its largest tensor 134 MB, packed in slices of 4 MB: some tens of MB at most."""
    config = replace(tiny_config, vocab_size=65536, hidden_size=512, n_routed_experts=64, moe_intermediate_size=128)
    initialise_native(config, tmp_path / "native")
    largest = max(4 * info.size for info in tensor_specs(config).values())
    assert largest == 65536 * 512 * 4
    result = child(tmp_path / "native", tmp_path / "out.v4c", plain_weights(config), 4 << 20)
    assert result.returncode == 0, result.stderr
    start, peak, slices_written = map(int, result.stdout.split())
    assert sum(file.stat().st_size for file in (tmp_path / "out.v4c").glob("weights-*")) > 350 << 20
    assert slices_written > 100
    assert peak - start < 64 << 20 < largest


@pytest.fixture(scope="module")
def lowered(tiny_config: ModelConfig) -> list[WeightSpec]:
    """The weights that the compiled functions of the tiny model take."""
    storage, options = storage_of("f32", "none"), PassOptions.checked(())
    model, _ = graph(tiny_config, options, storage, None)
    return lower(model, DEVICE, storage, options)[1]


def test_a_killed_compilation_goes_on(
    tiny_config: ModelConfig, lowered: list[WeightSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in one process, resumed by `v4c.compile` in another: the same bytes, each slice packed once."""

    def build(self: CPUTarget, module: Any, library: Path, options: Any) -> dict[str, list[Any]]:
        library.write_bytes(b"no code")  # kernels take a minute, and are not what is tested
        return {}

    monkeypatch.setattr(CPUTarget, "build", build)
    monkeypatch.setattr(weight_packing, "SLICE_BYTES", 20000)
    source, out = tmp_path / "native", tmp_path / "out"
    initialise_native(tiny_config, source)
    out.mkdir()
    steps: list[tuple[str, int, int]] = []
    whole = written(Checkpoint.open(source), out / "whole.v4c", lowered, lambda *step: steps.append(step))
    sizes = [done for _, done, _ in steps]
    assert sizes == sorted(sizes)
    assert steps[-1][1] == steps[-1][2] == sum(weight.nbytes for weight in Artifact(whole).manifest.weights)

    half = len(steps) // 2
    result = child(source, out / "killed.v4c", lowered, 20000, die=half + 1)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (left,) = (path for path in out.iterdir() if path != whole)
    assert left.name.startswith(".killed.v4c.")
    again: list[tuple[str, int, int]] = []
    resumed = v4c.compile(source, out / "killed.v4c", target=DEVICE.name, progress=lambda *step: again.append(step))
    assert resumed == out / "killed.v4c"
    assert any(what == "check packed weights" for what, _, _ in again)
    assert [step for step in again if step[0] == "pack weights"] == steps[half:]
    for file in whole.glob("weights-*"):
        assert (resumed / file.name).read_bytes() == file.read_bytes()
    assert Artifact(resumed).manifest.weights == Artifact(whole).manifest.weights
    assert {path.name for path in out.iterdir()} == {"whole.v4c", "killed.v4c"}


def test_onnx_weights_in_slices(
    tiny_onnx: Path, tiny_checkpoint: Path, lowered: list[WeightSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exported file (bfloat16 here) packs to the bytes of its checkpoint, however it is cut."""
    monkeypatch.setattr(weight_packing, "SLICE_BYTES", 20000)
    source = OnnxSource(tiny_onnx)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.experts.down_proj", "model.norm.weight"):
        rows, whole = source.tensor(name), source.load(name)
        assert rows.shape == whole.shape
        assert np.array_equal(rows.read(1, 3), whole[1:3])
        assert source.load(name, "f32").dtype == np.float32
    as_stored = {"float32": "bfloat16", "int64": "int64"}
    rounded = [
        weight if weight.layout in (Layout.PLAIN, Layout.ROUTER) else replace(weight, dtype=as_stored[weight.dtype])
        for weight in lowered
    ]
    stored = [
        (written(given, tmp_path / name, rounded) / "weights-00001.safetensors").read_bytes()
        for name, given in (("onnx", source), ("checkpoint", Checkpoint.open(tiny_checkpoint)))
    ]
    assert stored[0] == stored[1]
    assert [Path(path).name for path, _, _ in source.identity()] == ["tiny.onnx", "tiny.onnx.data"]
    with pytest.raises(CheckpointError, match="weight nonsense: expected an initializer, found none"):
        source.tensor("nonsense")
