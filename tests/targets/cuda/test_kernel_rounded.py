"""Attention and indexer on tensor cores against float64, queries and keys rounded as the kernels round them: what is
left is the rounding of attention's shares, whose bound is derived here."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import plans
from tests.targets.cuda.ops import KERNELS, ROUNDED, ROUNDED_STORAGE, check, results
from v4c.custom_ops import OPS
from v4c.passes.relax.importer import Importer
from v4c.passes.relax.layouts import Storage
from v4c.targets.cuda import architectures
from v4c.targets.cuda.kernels.attention_tile import prompt_tile, split_tile
from v4c.targets.cuda.lowering import CUDAKernels
from v4c.targets.cuda.schedule import AttentionSchedule

UNIT = 2.0**-8 + 2.0**-10
"""Error of an output relative to the sum of shares times sizes of values: a share is rounded to the 8 bits of bfloat16;
the rest is for sums in float32 (512 products of scores up to 30: 512 x 2^-24 x 30)."""

PLAIN = {"Sliding": "SlidingWindowAttention", "CSA": "CompressedSparseAttention", "HCA": "HeavilyCompressedAttention"}
DEROTATED = {"Sliding": "DerotatedSlidingAttention", "CSA": "DerotatedCSA", "HCA": "DerotatedHCA"}


def normal(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=rng)


def frequencies(rotary: int) -> torch.Tensor:
    return 10000.0 ** -(torch.arange(rotary // 2) / (rotary // 2))


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def sizes(kind: str, given: dict[str, torch.Tensor], ratio: int) -> torch.Tensor:
    """Sums of shares times sizes of values ``[B, S, H, C]``, by the op's definition, key by key; scores are q . key."""
    q, kv, window, rows = (given[n].double() for n in ("q", "kv", "window", "rows"))
    found = torch.zeros_like(q)
    for b, start in enumerate(given["positions"].tolist()):
        length = int(given["lengths"][b])
        for j in range(length):
            p = start + j
            near = range(max(0, p - window.shape[1] + 1), p + 1)
            keys = [window[b, t % window.shape[1]] if t < start else kv[b, t - start] for t in near]
            if kind == "CSA":
                keys += [rows[b, i] for i in given["indices"][b, j].tolist() if i >= 0]
            elif kind == "HCA":
                keys += [*rows[b, : min((p + 1) // ratio, (start + length) // ratio)]]
            held = torch.stack(keys)
            scores = torch.cat([q[b, j] @ held.T, given["sinks"].double()[:, None]], 1)
            found[b, j] = scores.softmax(-1)[:, :-1] @ held.abs()
    return found


def check_rounded(
    kind: str, given: dict[str, torch.Tensor], scale: float, derotated: bool, schedule: Any = None, ratio: int = 4
) -> dict[str, np.ndarray]:
    """Assert that outputs of live tokens are within `UNIT`, and that the ring is written unrounded; the outputs."""
    name = (DEROTATED if derotated else PLAIN)[kind]
    attributes: dict[str, Any] = {"ratio": ratio} if kind == "HCA" else {}
    found, exact = results(name, given, schedule, ROUNDED, **attributes, scale=scale)
    np.testing.assert_array_equal(found["window"], exact["window"].float().numpy())
    near = {n: rounded(given[n]) for n in ("kv", "window", "rows")} | {"q": rounded(given["q"] * scale)}
    op = OPS[name]
    values = [(given | near)[n] for n in op.inputs]
    out, _ = op.reference(*(v.double() if v.is_floating_point() else v for v in values), *attributes.values(), 1.0)
    bound = sizes(kind, given | near, ratio)
    if derotated:
        turned = 2 * len(given["inv_freq"])
        pairs = bound[..., -turned:].unflatten(-1, (-1, 2)).sum(-1, keepdim=True)
        bound[..., -turned:] = pairs.expand(*pairs.shape[:-1], 2).flatten(-2)
    live = np.arange(out.shape[1]) < given["lengths"].numpy()[:, None]
    excess = (np.abs(found["out"] - out.numpy()) - UNIT * bound.numpy())[live]
    assert excess.max(initial=0) <= 1e-6, f"{name}: off by {excess.max()} more than the bound"
    return found


CONFIGS = [(2, 32, 5, 8), (20, 64, 7, 16), (33, 48, 4, 6), (70, 16, 6, 16), (64, 32, 40, 8)]
SCHEDULES = [AttentionSchedule(split_tokens=4, splits=4), AttentionSchedule(split_tokens=8, splits=8, tile_keys=64)]


@settings(max_examples=10, deadline=None)
@given(
    plan=plans(12), config=st.sampled_from(CONFIGS), kind=st.sampled_from(list(PLAIN)), derotated=st.booleans(),
    schedule=st.sampled_from(SCHEDULES), sharp=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_calls_on_the_same_state(
    plan: list[tuple[int, np.ndarray]], config: tuple[int, int, int, int], kind: str, derotated: bool, schedule: Any,
    sharp: bool, seed: int,
) -> None:  # fmt: skip
    heads, width, window, rotary = config
    rng, batch = torch.Generator().manual_seed(seed), len(plan[0][1])
    capacity = sum(chunk for chunk, _ in plan) // 4 + 1
    given = {
        "rows": normal(rng, batch, capacity, width), "sinks": normal(rng, heads), "inv_freq": frequencies(rotary),
        "window": torch.full((batch, window, width), torch.nan), "positions": torch.zeros(batch, dtype=torch.int64),
    }  # fmt: skip
    for chunk, lengths in plan:
        indices = torch.full((batch, chunk, 6), -1)
        for b in range(batch):
            for j in range(chunk):
                ready = min(int(given["positions"][b] + j + 1) // 4, capacity)
                chosen = torch.randperm(ready, generator=rng)[:6]
                indices[b, j, torch.randperm(6, generator=rng)[: len(chosen)]] = chosen
        given |= {
            "q": normal(rng, batch, chunk, heads, width), "kv": normal(rng, batch, chunk, width), "indices": indices,
            "lengths": torch.tensor(lengths),
        }  # fmt: skip
        found = check_rounded(kind, given, (2.0 if sharp else 1.0) * width**-0.5, derotated, schedule)
        given["window"] = torch.from_numpy(found["window"])
        given["positions"] = given["positions"] + given["lengths"]


@pytest.mark.parametrize(("tokens", "heads", "keys"), [(1, 18, 32), (1, 64, 64), (5, 64, 32), (5, 64, 64), (5, 70, 64)])
def test_published_width(tokens: int, heads: int, keys: int) -> None:
    rng = torch.Generator().manual_seed(heads + tokens)
    chosen = torch.stack([torch.randperm(90, generator=rng)[:64] for _ in range(tokens)])
    chosen[torch.rand(chosen.shape, generator=rng) < 0.2] = -1
    given = {
        "q": normal(rng, 1, tokens, heads, 512), "kv": normal(rng, 1, tokens, 512), "rows": normal(rng, 1, 90, 512),
        "window": normal(rng, 1, 128, 512), "indices": chosen[None], "sinks": normal(rng, heads),
        "positions": torch.tensor([400]), "lengths": torch.tensor([tokens]), "inv_freq": frequencies(64),
    }  # fmt: skip
    check_rounded("CSA", given, 512**-0.5, True, AttentionSchedule(split_tokens=4, splits=8, tile_keys=keys))


@pytest.mark.parametrize("kernels", [KERNELS, ROUNDED], ids=["float32", "rounded"])
def test_few_tokens_are_those_read_alone(kernels: CUDAKernels) -> None:
    rng, tokens = torch.Generator().manual_seed(3), 4
    given = {
        "q": normal(rng, 1, tokens, 20, 64), "kv": normal(rng, 1, tokens, 64), "rows": normal(rng, 1, 90, 64),
        "window": normal(rng, 1, 40, 64), "sinks": normal(rng, 20), "inv_freq": frequencies(16),
    }  # fmt: skip
    schedule = AttentionSchedule(split_tokens=4, splits=8)

    def read(chunk: slice, window: torch.Tensor) -> dict[str, np.ndarray]:
        own = {n: given[n][:, chunk] for n in ("q", "kv")}
        place = {"positions": torch.tensor([200 + chunk.start]), "lengths": torch.tensor([chunk.stop - chunk.start])}
        inputs = given | own | place | {"window": window}
        return results("DerotatedHCA", inputs, schedule, kernels, ratio=4, scale=0.1)[0]

    together, window = read(slice(0, tokens), given["window"]), given["window"]
    for j in range(tokens):
        alone = read(slice(j, j + 1), window)
        np.testing.assert_array_equal(alone["out"][0, 0], together["out"][0, j])
        window = torch.from_numpy(alone["window"])
    np.testing.assert_array_equal(window.numpy(), together["window"])


@pytest.mark.parametrize("tokens", [2, 9])
def test_other_widths_stay_in_float32(tokens: int) -> None:
    rng = torch.Generator().manual_seed(tokens)
    given = {
        "q": normal(rng, 1, tokens, 3, 40), "kv": normal(rng, 1, tokens, 40), "window": normal(rng, 1, 4, 40),
        "sinks": normal(rng, 3), "positions": torch.tensor([30]), "lengths": torch.tensor([tokens]),
    }  # fmt: skip
    check("SlidingWindowAttention", given, 2e-5, AttentionSchedule(split_tokens=4), kernels=ROUNDED, scale=40**-0.5)


@pytest.mark.parametrize(("heads", "width"), [(5, 32), (64, 128), (40, 48)])
@pytest.mark.parametrize("tokens", [1, 11])
def test_indexer(tokens: int, heads: int, width: int) -> None:
    rng = torch.Generator().manual_seed(heads)
    given = {
        "q": normal(rng, 1, tokens, heads, width), "weights": normal(rng, 1, tokens, heads),
        "index_rows": normal(rng, 1, 300, width), "positions": torch.tensor([1000]), "lengths": torch.tensor([tokens]),
    }  # fmt: skip
    found, _ = results("LightningIndex", given, kernels=ROUNDED, ratio=4, top_k=20)
    q, rows = (rounded(given[n]).double() for n in ("q", "index_rows"))
    scores = torch.einsum("bshd,bnd->bshn", q, rows).relu().mul(given["weights"].double()[..., None]).sum(2)
    for j in range(tokens):
        own = scores[0, j, : (1000 + j + 1) // 4]
        chosen = torch.from_numpy(found["indices"][0, j])
        assert len(chosen.unique()) == 20
        assert chosen.max() < len(own)
        # Equal but for sums in float32: rows that nearly tie may stand for each other.
        torch.testing.assert_close(own[chosen], own.topk(20).values, rtol=0, atol=1e-5 * float(own.abs().max()))


def test_only_models_in_float32_are_computed_in_it() -> None:
    assert KERNELS.storing(Storage()).arithmetic == "float32"
    assert KERNELS.storing(Storage("float32", "bfloat16")).arithmetic == "bfloat16"
    imported = Importer(ir.Model(ir.Graph([], [], nodes=[]), ir_version=11), KERNELS, frozenset(), ROUNDED_STORAGE)
    assert imported.kernels.arithmetic == "bfloat16"  # type: ignore[attr-defined]


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES.values(), ids=lambda a: a.name)
@pytest.mark.parametrize(("heads", "width"), [(64, 512), (128, 512), (48, 512), (2, 512), (64, 192), (64, 48)])
def test_tiles_fit_into_shared_memory(heads: int, width: int, architecture: architectures.Architecture) -> None:
    tile = prompt_tile(heads, width, AttentionSchedule.suited(architecture.shared_bytes).tile_keys)
    assert tile is not None
    assert tile.shared_bytes <= architecture.shared_bytes
    assert heads <= tile.heads * -(-heads // tile.heads) < heads + 16 * -(-heads // 64)
    assert split_tile(width).shared_bytes <= architecture.shared_bytes
    assert tile.keys == 64 or architecture.name == "sm_80"
