"""The cost of kernel calls: by hand on single ones, and whole models against the estimate made from the config."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4c.custom_ops import OPS, TensorSpec
from v4c.frontend import estimate
from v4c.frontend.config import ModelConfig
from v4c.frontend.onnx_export import build
from v4c.frontend.presets import preset
from v4c.passes.cost import GROUPED_PRODUCT, cost_of
from v4c.passes.measure import CONTEXT, measure_onnx


def spec(*shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(shape, dtype)


def test_a_product_reads_its_weight_once() -> None:
    cost = cost_of("MatMul", [spec(3, 1, 10), spec(20, 10, dtype="bfloat16")], [spec(3, 1, 20)])
    assert cost.flops == 2 * 3 * 10 * 20
    assert cost.bytes == 4 * 30 + 2 * 200 + 4 * 60


def test_a_packed_weight_is_read_as_it_lies() -> None:
    """20 rows in panels of 32: the padding is read, too, but its products are nobody's."""
    cost = cost_of("MatMul", [spec(3, 10), spec(1, 10, 32)], [spec(3, 20)])
    assert cost.bytes == 4 * (30 + 320 + 60)
    assert cost.flops == 2 * 3 * 10 * 20


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [
        ((4, 4, 3, 1088), (4, 3, 2, 1088)),  # int8 in panels: 4 experts of 64 for 96
        ((4, 4, 3, 576), (4, 3, 2, 576)),
        ((4, 4, 3, 544), (4, 3, 2, 544)),  # FP4
        ((4, 4, 1, 4160), (4, 3, 1, 4160)),  # FP8, whose only group of inputs is not full
        ((4, 4, 48, 128), (4, 3, 32, 128)),  # pairs of bfloat16
        ((4, 128, 112), (4, 96, 80)),  # rows of FP8 on a GPU
        ((4, 128, 64), (4, 96, 48)),  # of FP4
    ],
)
def test_experts_count_their_weights_however_they_lie(gate_up: tuple[int, ...], down: tuple[int, ...]) -> None:
    inputs = [spec(1, 1, 96), spec(1, 1, 2), spec(1, 1, 2, dtype="int64")]
    inputs += [spec(*gate_up, dtype="uint8"), spec(*down, dtype="uint8")]
    assert cost_of("GroupedExperts", inputs, [spec(1, 1, 96)]).flops == 2 * 2 * 3 * 64 * 96


@pytest.mark.parametrize(("bits", "block"), [(8, 1088), (4, 576)])
def test_quantised_weights_count_by_number_and_by_bytes(bits: int, block: int) -> None:
    """64 outputs of 96 inputs: two panels of three groups, each with 32 scales and 1024 weights."""
    assert block == 2 * 32 + 1024 * bits // 8
    cost = cost_of("MatMul", [spec(1, 96), spec(2, 3, block, dtype="uint8")], [spec(1, 64)])
    assert cost.flops == 2 * 64 * 96
    assert cost.bytes == 4 * 96 + 2 * 3 * block + 4 * 64


def test_blocks_on_the_diagonal_meet_their_own_part_of_the_input() -> None:
    cost = cost_of(GROUPED_PRODUCT, [spec(3, 2, 10), spec(2, 5, 10)], [spec(3, 2, 5)])
    assert cost.flops == 2 * 3 * 2 * 5 * 10


@pytest.mark.parametrize("op", ["GroupedExperts", "MixtureOfExperts"])
def test_only_chosen_experts_count(op: str) -> None:
    routed = [spec(1, 1, 8), spec(1, 1, 2), spec(1, 1, 2, dtype="int64")]
    shared = [spec(2 * 6, 8), spec(8, 6)] if op == "MixtureOfExperts" else []

    def of(experts: int) -> float:
        return cost_of(op, [*routed, spec(experts, 2 * 4, 8), spec(experts, 8, 4), *shared], [spec(1, 1, 8)]).bytes

    assert of(16) == of(64)
    assert of(64) - of(1) == 4 * 3 * 4 * 8  # two experts rather than the only one
    both = cost_of(op, [*routed, spec(64, 8, 8), spec(64, 8, 4), *shared], [spec(1, 1, 8)])
    assert both.flops == 2 * 2 * 3 * 4 * 8 + (2 * 3 * 6 * 8 if shared else 0)


def test_a_lookup_reads_rows() -> None:
    small, large = (cost_of("Gather", [spec(v, 8), spec(1, 5, dtype="int64")], [spec(1, 5, 8)]) for v in (10, 10**6))
    assert small == large


@pytest.mark.parametrize("name", ["v4-nano", "v4-mini"])
def test_a_whole_step_agrees_with_the_estimate(name: str) -> None:
    """FLOPs as the config's formulas have them; bytes between the active weights alone and a tenth more."""
    config = preset(name)
    model = build(config)
    figures = measure_onnx(model, frozenset(json.loads(model.metadata_props["v4c.weights"])), "float32")
    assert figures.cost.flops == pytest.approx(estimate.flops_per_token(config, CONTEXT), rel=0.03)
    weights = 4 * estimate.active_parameters(config)
    cache = 4 * 2 * config.head_dim * (config.sliding_window + config.index_topk) * config.num_hidden_layers
    assert weights < figures.cost.bytes < 1.1 * weights + cache


def test_every_op_has_a_cost_of_its_own_or_is_elementwise(tiny_engram: ModelConfig) -> None:
    """An op without a rule counts all its operands; that is right for these alone."""
    from v4c.passes.cost import _ATTENTION, _RULES

    assert set(OPS) - set(_RULES) - set(_ATTENTION) == {"TrailingRope", "RotaryQueryKV", "TopKRoute", "ClampedSwiGLU"}


class Positions(NamedTuple):
    """A vector of positions whose values are known, as `v4c bench` notes it."""

    shape: tuple[int, ...]
    dtype: str
    values: tuple[int, ...]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=3), st.integers(1, 40), st.sampled_from([4, 32]))
def test_attention_counts_the_rows_that_each_token_sees(starts: list[int], chunk: int, ratio: int) -> None:
    batch, heads, width, window, top_k, capacity = len(starts), 3, 8, 16, 5, 512
    positions = Positions((batch,), "int64", tuple(starts))
    q, kv = spec(batch, chunk, heads, width), spec(batch, chunk, width)
    ring, rows = spec(batch, window, width), spec(batch, capacity // ratio, width)
    indices, sinks = spec(batch, chunk, top_k, dtype="int64"), spec(heads)
    known = [start + j + 1 for start in starts for j in range(chunk)]
    raw = sum(min(t, window) for t in known)

    def flops(op: str, *inputs: Any) -> float:
        return cost_of(op, [*inputs, positions, spec(batch, dtype="int64")], [q], capacity).flops

    assert flops("SlidingWindowAttention", q, kv, ring, sinks) == 4 * heads * width * raw
    chosen = sum(min(t // ratio, top_k) for t in known)
    assert flops("CompressedSparseAttention", q, kv, ring, rows, indices, sinks) == 4 * heads * width * (raw + chosen)
    ready = sum(t // ratio for t in known)
    assert flops("HeavilyCompressedAttention", q, kv, ring, rows, sinks) == 4 * heads * width * (raw + ready)
    assert flops("LightningIndex", q, spec(batch, chunk, heads), rows) == 2 * heads * width * ready


def test_attention_without_known_positions_counts_full_windows() -> None:
    inputs = [spec(1, 2, 3, 8), spec(1, 2, 8), spec(1, 16, 8), spec(3), spec(1, dtype="int64"), spec(1, dtype="int64")]
    assert cost_of("SlidingWindowAttention", inputs, [spec(1, 2, 3, 8)]).flops == 4 * 2 * 3 * 16 * 8
