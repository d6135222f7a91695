"""Caches are never copied, whatever their capacity: the compiled functions write the session's own buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import v4c


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_a_large_capacity_costs_nothing_until_used(tiny_artifact: Path) -> None:
    model = v4c.load(tiny_artifact)
    small, large = model.new_session(max_context=256), model.new_session(max_context=model.max_context)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (1, 200))
    expected = small.prefill(ids)
    before = resident_bytes()
    assert np.array_equal(large.prefill(ids), expected)
    branch = large.fork()
    assert np.array_equal(branch.decode(ids[:, 0]), small.decode(ids[:, 0]))
    assert resident_bytes() - before < 32 << 20


def test_two_sessions_share_no_state(tiny_artifact: Path) -> None:
    model = v4c.load(tiny_artifact)
    ids = np.random.default_rng(1).integers(0, model.vocab_size, (2, 150))
    alone = model.new_session(max_context=200)
    expected = [alone.prefill(ids[:1, :100])] + [alone.decode(ids[:1, t]) for t in range(100, 150)]
    first, second = model.new_session(max_context=200), model.new_session(max_context=200)
    found = [first.prefill(ids[:1, :100])]
    second.prefill(ids[1:, :120])
    for t in range(100, 150):
        found.append(first.decode(ids[:1, t]))
        second.decode(ids[1:, t - 50])
    assert np.array_equal(np.stack(found), np.stack(expected))


def test_sessions_in_several_threads(tiny_artifact: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = v4c.load(tiny_artifact)
    rng = np.random.default_rng(2)
    prompts = rng.integers(0, model.vocab_size, (6, 1, 90))

    def run(prompt: np.ndarray) -> np.ndarray:
        session = model.new_session(max_context=128)
        session.prefill(prompt[:, :64])
        return np.stack([session.decode(prompt[:, t]) for t in range(64, 90)])

    expected = [run(p) for p in prompts]
    with ThreadPoolExecutor(3) as pool:
        for found, want in zip(pool.map(run, prompts), expected, strict=True):
            assert np.array_equal(found, want)
