"""What peers are measured against: bytes and FLOPs counted from the config, against other counts of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.peer_costs import prompt_flops, resident_bytes, step_bytes
from v4c.frontend.estimate import active_parameters, flops_per_token, weight_bytes
from v4c.frontend.presets import preset

MINI, SLICE = preset("v4-mini"), preset("flash-slice")


def test_weights_of_a_step_are_the_active_parameters() -> None:
    """In float32 and with nothing cached; of a hash layer's router a step reads some rows, and ids from its table."""
    config = replace(MINI, mlp_types=("topk",) * MINI.num_hidden_layers)
    assert step_bytes(config, 4.0, 4, 0) == pytest.approx(4 * active_parameters(config))
    unread = 2 * MINI.hidden_size * (MINI.n_routed_experts - MINI.num_experts_per_tok)
    ids = 2 * MINI.num_experts_per_tok
    correction_biases = 2 * MINI.n_routed_experts
    expected = 4 * (active_parameters(config) - unread + ids - correction_biases)
    assert step_bytes(MINI, 4.0, 4, 0) == pytest.approx(expected)


def test_the_slice_reads_what_it_was_made_for() -> None:
    """1.70 G weights a token, as flash-slice is described."""
    assert step_bytes(SLICE, 1.0, 2, 0) / 1e9 == pytest.approx(1.70, abs=0.03)


def test_caches_of_a_step() -> None:
    """v4-mini at 16384 tokens, counted by hand: 2 sliding, 3 CSA and 3 HCA layers of 512 wide rows."""
    window = 8 * 128 * 512
    csa = 3 * (512 * 512 + 16384 // 4 * 128)
    hca = 3 * (16384 // 128) * 512
    assert step_bytes(MINI, 2.0, 2, 16384) - step_bytes(MINI, 2.0, 2, 0) == 2 * (window + csa + hca)


@settings(deadline=None, max_examples=25)
@given(start=st.integers(0, 5000), first=st.integers(1, 40), second=st.integers(1, 40))
def test_a_prompt_in_two_chunks_costs_one_more_head(start: int, first: int, second: int) -> None:
    head = 2 * MINI.vocab_size * MINI.hidden_size
    parts = prompt_flops(MINI, start, first) + prompt_flops(MINI, start + first, second)
    assert parts == prompt_flops(MINI, start, first + second) + head
    assert prompt_flops(MINI, start, 1) == flops_per_token(MINI, start)


def test_memory_of_the_weights() -> None:
    for config in (MINI, SLICE):
        assert resident_bytes(config, 2.0) == pytest.approx(weight_bytes(config, "bf16"))
