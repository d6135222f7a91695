"""`v4c.bench` on the tiny model: what it reports must hang together; how fast anything is, no test can say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import v4c
from tests.runtime import fake_model
from v4c.benchmark_limits import largest_cache, machine
from v4c.benchmark_profile import BETWEEN, Launch, against, launches, rows, typical
from v4c.errors import ArtifactError, InputError, OutputError
from v4c.passes.cost import MATRIX_PEAK, STREAM_READ, Cost, cost_of
from v4c.runtime import load
from v4c.runtime.artifact import read_manifest
from v4c.runtime.profile import Argument, Call

CONTEXT, PROMPT = 64, 33


class FixedLimits:
    """1 GB/s and 1 GFLOP/s: a byte and an operation take a nanosecond each."""

    bandwidth = peak = 1e9


@pytest.fixture(scope="module")
def traced(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """A profiled run, and its trace."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    document = v4c.bench(tiny_artifact, contexts=[CONTEXT, 5], prompt_tokens=PROMPT, rounds=9, profile=True, trace=path)
    return document, json.loads(path.read_text())


def test_a_run_reports_every_measurement(traced: tuple[dict[str, Any], dict[str, Any]], tiny_artifact: Path) -> None:
    document, _ = traced
    assert document["machine"] == machine()
    assert document["threads"] == load(tiny_artifact).threads
    assert document["stream_bandwidth_gbs"] > 0
    assert document["matrix_peak_gflops"] > 0
    assert [d["context"] for d in document["decode"]] == [CONTEXT, 5]
    assert [p["tokens"] for p in document["prefill"]] == [PROMPT]
    for figures, tokens in ((document["decode"][0], 1), (document["prefill"][0], PROMPT)):
        assert 0 < figures["p10_ms"] <= figures["ms"] <= figures["p90_ms"]
        assert figures["tokens_per_second"] == pytest.approx(tokens / figures["ms"] * 1e3)
        gbs = figures["bytes_read"] / figures["ms"] / 1e6
        assert figures["bandwidth_share"] == pytest.approx(gbs / document["stream_bandwidth_gbs"])
        assert figures["peak_share"] == pytest.approx(figures["flops"] / figures["ms"] / 1e6
                                                      / document["matrix_peak_gflops"])  # fmt: skip


def test_a_step_reads_its_weights_and_more_at_a_longer_context(
    traced: tuple[dict[str, Any], dict[str, Any]], tiny_artifact: Path
) -> None:
    document, _ = traced
    manifest = read_manifest(tiny_artifact)
    stacks = ("experts", "embed")  # chosen experts and rows only
    always = sum(w.nbytes for w in manifest.weights if not any(part in w.name for part in stacks))
    long, short = (d["bytes_read"] for d in document["decode"])
    assert always * 0.9 < short < long < sum(w.nbytes for w in manifest.weights)
    assert document["prefill"][0]["flops"] > document["decode"][0]["flops"]


def test_rows_add_up_to_the_step(traced: tuple[dict[str, Any], dict[str, Any]], tiny_artifact: Path) -> None:
    document, _ = traced
    kernels = read_manifest(tiny_artifact).build["kernels"]
    for part in (*document["profile"]["decode"], *document["profile"]["prefill"]):
        table = part["rows"]
        # The kernels alone may exceed the step on a busy machine: test_cli_bench.py looks closer, in a quieter process.
        assert sum(row["ms"] for row in table) > part["step_ms"] * 0.999
        assert sum(row["share"] for row in table) == pytest.approx(sum(r["ms"] for r in table) / part["step_ms"])
        assert [row["winnable_ms"] for row in table] == sorted((r["winnable_ms"] for r in table), reverse=True)
        names = [row["kernel"] for row in table]
        assert len(set(names)) == len(names)
        assert set(names) - {BETWEEN} <= set(kernels)
        between = next(row for row in table if row["kernel"] == BETWEEN)
        assert between["calls"] == sum(row["calls"] for row in table) - between["calls"] > 10
    (decode, short), (prefill,) = document["profile"]["decode"], document["profile"]["prefill"]
    assert decode["context"] == CONTEXT
    assert {r["kernel"] for r in decode["rows"]} == {r["kernel"] for r in short["rows"]}
    assert {"CompressedSparseAttention", "DerotatedCSA"} & {r["op"] for r in prefill["rows"]}


def test_a_profile_sums_up_to_the_figures(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    document, _ = traced
    for kind in ("decode", "prefill"):
        for figures, part in zip(document[kind], document["profile"][kind], strict=True):
            assert sum(row["bytes"] for row in part["rows"]) == pytest.approx(figures["bytes_read"])
            assert sum(row["flops"] for row in part["rows"]) == pytest.approx(figures["flops"])
            assert part["step_ms"] == figures["ms"]


def test_the_trace_has_a_track_per_measurement_with_kernels_inside_functions(
    traced: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    document, trace = traced
    events = trace["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert list(names.values()) == [f"decode at {CONTEXT}", "decode at 5", f"prefill of {PROMPT}"]
    for track, part in zip(names, (*document["profile"]["decode"], *document["profile"]["prefill"]), strict=True):
        spans = [e for e in events if e["ph"] == "X" and e["tid"] == track]
        assert spans[0]["ts"] == 0
        assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in spans)
        made = [e for e in spans if e["cat"] == "kernel"]
        assert len(made) == next(r["calls"] for r in part["rows"] if r["kernel"] == BETWEEN)
        assert sum(e["args"]["flops"] for e in made) == pytest.approx(sum(r["flops"] for r in part["rows"]))
        layers = [e for e in spans if "Layer" in e["name"]]
        assert len(layers) == 3
        inside = [e for e in made if layers[0]["ts"] <= e["ts"] <= layers[0]["ts"] + layers[0]["dur"]]
        assert 0 < len(inside) < len(made)


def test_nothing_is_profiled_unless_asked(tiny_artifact: Path) -> None:
    document = v4c.bench(tiny_artifact, contexts=[1], prompt_tokens=1, rounds=1)
    assert "profile" not in document
    assert document["decode"][0]["ms"] > 0


def test_a_long_context_is_filled_with_what_was_read(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v4c.benchmark.LONGEST_FILL", 256)
    document = v4c.bench(tiny_artifact, contexts=[4096], prompt_tokens=8, rounds=2)
    assert document["decode"][0]["context"] == 4096


def test_no_torch_and_no_compiler(tiny_artifact: Path) -> None:
    probe = (
        f"import json, sys, v4c\nv4c.bench({str(tiny_artifact)!r}, contexts=[8], prompt_tokens=8, rounds=1, "
        "profile=True)\n"
        "print(json.dumps([name for name in ('torch', 'tvm', 'onnx', 'onnxscript') if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"contexts": [4097]}, InputError, "context: expected an integer from 1 to 4096, found 4097"),
        ({"contexts": [0]}, InputError, "context: expected an integer from 1 to 4096, found 0"),
        ({"prompt_tokens": 0}, InputError, "prompt_tokens"),
        ({"rounds": 0}, InputError, "rounds"),
        ({"trace": "no/such/folder/trace.json"}, OutputError, "trace.json"),
        ({"trace": "."}, OutputError, "file name"),
    ],
)
def test_refusals(arguments: dict[str, Any], error: type[Exception], message: str, tiny_artifact: Path) -> None:
    with pytest.raises(error, match=message):
        v4c.bench(tiny_artifact, **arguments)


def test_artifacts_from_before_there_was_a_bench(tmp_path: Path) -> None:
    library = fake_model.compile_library(tmp_path / "model.so")
    with pytest.raises(ArtifactError, match=r"table of kernels .* compile it again"):
        v4c.bench(fake_model.write(tmp_path / "old", library))
    with pytest.raises(ArtifactError, match=r"functions that measure the machine.* compile it again"):
        v4c.bench(fake_model.write(tmp_path / "half", library, build={"kernels": {}}), contexts=[8], prompt_tokens=8)


def test_every_artifact_measures_its_machine(tiny_artifact: Path) -> None:
    model = load(tiny_artifact)
    assert model.library_function(STREAM_READ) is not None
    assert model.library_function(MATRIX_PEAK) is not None
    assert model.library_function("v4c_other") is None
    assert largest_cache() >= 0


sizes = st.integers(0, 10**9)


@given(ms=st.floats(1e-6, 1e6), moved=sizes, flops=sizes)
def test_what_could_be_won_is_the_time_above_the_limit_that_binds(ms: float, moved: int, flops: int) -> None:
    found = against(ms, moved, flops, FixedLimits)  # type: ignore[arg-type]
    assert found["bandwidth_share"] == pytest.approx(moved / 1e6 / ms)
    assert found["peak_share"] == pytest.approx(flops / 1e6 / ms)
    assert found["limit"] == ("bandwidth" if moved >= flops else "arithmetic")
    assert found["winnable_ms"] == pytest.approx(max(0.0, ms - max(moved, flops) / 1e6))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_a_typical_step_is_the_median(times: list[int]) -> None:
    chosen = typical([[Call("k", 0, 0, ns)] for ns in times], [Launch(0, "k", "", Cost())])
    assert chosen[0].ns == sorted(times)[len(times) // 2]


def test_launches_and_rows_of_a_known_step() -> None:
    kernels = {"product": ["MatMul", 2], "loop": ["", 1]}
    x, w, y = Argument((1, 4), "float32"), Argument((8, 4), "bfloat16"), Argument((1, 8), "float32")
    step = [
        Call("layer", 0, 0, 900),
        Call("product", 1, 100, 400),
        Call("loop", 1, 600, 100),
        Call("product", 0, 950, 600),
    ]
    made = launches(step, [(x, w), (x, w, y), (y, y), (x, w, y)], kernels)
    assert [(m.call, m.kernel, m.op) for m in made] == [
        (1, "product", "MatMul"),
        (2, "loop", ""),
        (3, "product", "MatMul"),
    ]
    assert made[0].cost == cost_of("MatMul", [x, w], [y]) == Cost(16 + 64 + 32, 64)
    table = {row["kernel"]: row for row in rows(made, [step, step], 0.002, FixedLimits)}  # type: ignore[arg-type]
    assert [(table[k]["calls"], table[k]["ms"]) for k in ("product", "loop")] == [(2, 0.001), (1, 0.0001)]
    assert table[BETWEEN]["ms"] == pytest.approx(0.0009)
    assert (table["product"]["bytes"], table["product"]["flops"]) == (224, 128)
    crowded = rows(made, [step], 0.0005, FixedLimits)  # type: ignore[arg-type]
    assert next(r for r in crowded if r["kernel"] == BETWEEN)["ms"] == 0
