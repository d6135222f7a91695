"""What custom ops become on the way to linalg, against their torch references; needs no MLIR."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from v4c.custom_ops import OPS
from v4c.frontend.mlir import decompositions, select
from v4c.frontend.mlir.reshapes import changed_axes, respell
from v4c.frontend.mlir.rotation import within_turn

WINDOW, WIDTH, HEADS, CAPACITY = 16, 8, 4, 256
TOLERANCE = 1e-5


def where(seed: int, batch: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Positions and lengths of a chunk that ends within the capacity; the first row is full."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, CAPACITY - chunk + 1, (batch,), generator=generator)
    lengths = torch.randint(0, chunk + 1, (batch,), generator=generator)
    lengths[0] = chunk
    return positions, lengths


def fresh(state: Tensor, positions: Tensor, ratio: int = 1) -> Tensor:
    """Rows of a state that no token before `positions` wrote become NaN: they must not be read."""
    slot = torch.arange(state.shape[1])
    unwritten = (slot + 1) * ratio > positions[:, None]
    return state.masked_fill(unwritten[..., None], torch.nan)


def tensors(name: str, seed: int, batch: int, chunk: int) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
    """Random inputs and attributes of an op with state."""
    torch.manual_seed(seed)
    x, (positions, lengths) = torch.randn, where(seed, batch, chunk)
    q, kv = x(batch, chunk, HEADS, WIDTH), x(batch, chunk, WIDTH)
    window, sinks, tail = fresh(x(batch, WINDOW, WIDTH), positions), x(HEADS), (positions, lengths)
    if name == "SlidingWindowAttention":
        return (q, kv, window, sinks, *tail), (0.3,)
    if name == "HeavilyCompressedAttention":
        rows = fresh(x(batch, CAPACITY // 8, WIDTH), positions + lengths, 8)
        return (q, kv, window, rows, sinks, *tail), (8, 0.3)
    if name == "CompressedSparseAttention":
        rows = x(batch, CAPACITY // 4, WIDTH)
        return (q, kv, window, rows, torch.randint(-1, CAPACITY // 4, (batch, chunk, 12)), sinks, *tail), (0.3,)
    if name == "EngramHash":
        tables = (torch.randint(0, 40, (50,)), torch.randint(0, 2**62, (3,)))
        primes = (torch.tensor([7, 11, 13, 17]), torch.tensor([0, 7, 18, 31]))
        return (torch.randint(0, 50, (batch, chunk)), *tables, *primes, torch.randint(0, 40, (batch, 2)), *tail), (2,)
    if name == "EngramGateConv":
        norms = (x(4, WIDTH), x(4, WIDTH), x(4, WIDTH))
        state = fresh(x(batch, 9, 4 * WIDTH), positions)
        streams = x(batch, chunk, 4, WIDTH)
        return (x(batch, chunk, 4, WIDTH), kv, streams, *norms, x(4 * WIDTH, 4), state, *tail), (3, 1e-6)
    halves, ratio = (1, 8) if name == "KVCompress" else (2, 4)
    wide = [x(batch, chunk, halves * WIDTH) for _ in range(2)]
    state = [fresh(x(batch, halves * ratio, halves * WIDTH), positions) for _ in range(2)]
    rows = x(batch, CAPACITY // ratio, WIDTH)
    return (*wide, x(ratio, halves * WIDTH), x(WIDTH), torch.tensor([0.01, 0.001]), *state, rows, *tail), (ratio, 1e-6)


STATEFUL = (
    "SlidingWindowAttention", "HeavilyCompressedAttention", "CompressedSparseAttention", "EngramHash",
    "EngramGateConv", "KVCompress", "KVCompress overlapping",
)  # fmt: skip


@pytest.mark.parametrize("case", STATEFUL)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 3), chunk=st.sampled_from([1, 2, 3, 7, 16, 17, 70, 140]))
def test_ops_with_state(case: str, seed: int, batch: int, chunk: int) -> None:
    name = case.split()[0]
    inputs, attributes = tensors(case, seed, batch, chunk)
    lengths = inputs[-1]
    live = torch.arange(chunk) < lengths[:, None]
    expected = OPS[name].reference(*inputs, *attributes)
    found = decompositions.FUNCTIONS[name](*inputs, *attributes)
    for index, (left, right) in enumerate(zip(found, expected, strict=True)):
        if index == 0 and name != "KVCompress":  # what padding tokens yield means nothing
            left, right = left[live], right[live]
        torch.testing.assert_close(left, right, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), chunk=st.sampled_from([1, 5, 40]), rows=st.integers(1, 300), top_k=st.integers(1, 70)
)
def test_lightning_index_chooses_the_same_rows(seed: int, chunk: int, rows: int, top_k: int) -> None:
    torch.manual_seed(seed)
    positions, lengths = torch.randint(0, max(1, 4 * rows - chunk), (2,)), torch.randint(0, chunk + 1, (2,))
    # Whole numbers: sums are exact, and many scores are equal.
    q, weights = torch.randint(-2, 3, (2, chunk, 3, 4)).float(), torch.randint(-2, 3, (2, chunk, 3)).float()
    keys = torch.randint(-2, 3, (2, rows, 4)).float()
    lengths = torch.minimum(lengths, (4 * rows - positions).clamp(min=0))
    arguments = (q, weights, keys, positions, lengths, 4, top_k)
    expected = OPS["LightningIndex"].reference(*arguments)
    found = decompositions.FUNCTIONS["LightningIndex"](*arguments)
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)


def test_keys_keep_the_order_of_floats() -> None:
    edges = [0.0, -0.0, 1e-45, 1.2e-38, 1.17549435e-38, 1.0, 1.0 + 2**-23, 2.0, 3.4e38, 0.5, 1 - 2**-24, 65504.0]
    values = torch.tensor(sorted({v * s for v in edges for s in (1, -1)} | set(torch.randn(500).tolist())))
    keys = select._ordered(values)
    assert (keys[1:] > keys[:-1]).eq(values[1:] > values[:-1]).all()
    assert keys.abs().max() * 2**select._INDEX_BITS < 2**59
    assert select._ordered(torch.tensor(0.0)) == select._ordered(torch.tensor(-0.0))


@pytest.mark.parametrize("experts", [4, 16])
def test_topk_route_with_ties(experts: int) -> None:
    logits, bias = torch.randint(-2, 3, (3, 20, experts)).float(), torch.randint(0, 2, (experts,)).float()
    expected = OPS["TopKRoute"].reference(logits, bias, 4, 1.5)
    found = decompositions.FUNCTIONS["TopKRoute"](logits, bias, 4, 1.5)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_experts(dtype: torch.dtype) -> None:
    x, weights, indices = torch.randn(2, 9, 8), torch.randn(2, 9, 3), torch.randint(-1, 6, (2, 9, 3))
    weights = weights.masked_fill(indices < 0, torch.nan)  # a choice of no expert has no weight
    gate_up, down = torch.randn(6, 10, 8).to(dtype), torch.randn(6, 8, 5).to(dtype)
    arguments = (x, weights, indices, gate_up, down, 1.0)
    expected, found = (
        OPS["GroupedExperts"].reference(*arguments),
        decompositions.FUNCTIONS["GroupedExperts"](*arguments),
    )
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_angles_within_one_turn() -> None:
    """Whatever the position, the reduced angle has the sine of the float32 angle."""
    angles = torch.cat([torch.arange(1 << 20).float(), torch.rand(100_000) * (1 << 20), torch.tensor([math.pi, 6.25])])
    reduced = within_turn(angles)
    assert reduced.abs().max() < 3.25
    assert (reduced.double().sin() - angles.double().sin()).abs().max() < 5e-7
    assert (reduced.double().cos() - angles.double().cos()).abs().max() < 5e-7


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 3, 4, 8), (2, 3, 32), (2, 2, 1)),
        ((2, 3, 32), (2, 3, 4, 8), (2, 1, 2)),
        ((2, 3, 8), (6, 8), (0, 2, 1)),
        ((6, 8), (2, 3, 8), (0, 1, 2)),
        ((5, 8), (5, 1, 8), (1, 0, 1)),
        ((5, 1, 8), (5, 8), (1, 1, 0)),
        ((5, 8), (5, 8), (2, 0, 0)),
    ],
)
def test_changed_axes(before: tuple[int, ...], after: tuple[int, ...], expected: tuple[int, int, int]) -> None:
    assert changed_axes(before, after) == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 3, 4, 8), (2, 3, 32)), ((2, 3, 8), (6, 8)), ((6, 8), (2, 3, 8)), ((2, 3, 4), (2, 12, 1)), ((4, 6), (3, 8)),
     ((5, 8), (5, 1, 1, 8)), ((5, 1, 1, 8), (5, 8)), ((2, 3), (2, 3)), ((2, 6), (2, -1, 3))],
)  # fmt: skip
def test_respelled_reshapes_give_the_same(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    x = torch.arange(math.prod(before)).view(before)
    traced = make_fx(lambda t: t.view(after), tracing_mode="fake")(x)
    respell(traced)
    assert not [node for node in traced.graph.nodes if node.target is torch.ops.aten.view.default]
    assert torch.equal(traced(x), x.view(after))


def test_every_traced_op_has_a_function_with_the_references_arguments() -> None:
    import inspect

    for name, function in decompositions.FUNCTIONS.items():
        ours, theirs = inspect.signature(function), inspect.signature(OPS[name].reference)
        assert list(ours.parameters) == list(theirs.parameters), name
