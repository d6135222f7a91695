"""A needle in the caches: one compressed row is the only strong match, and the kernels of a CSA layer find it.

Caches of 4 thousand to a million tokens are filled with rows that match nothing; around the needle, tokens are read by
the compressors in two chunks whose border lies within the needle's window. The query stands at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.targets import narrow_rows
from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.attention import compressed_sparse_attention
from v4c.targets.cpu.kernels.compress import kv_compress_pair
from v4c.targets.cpu.kernels.index import lightning_index

RATIO, WINDOW, TOP_K, HEADS = 4, 16, 8, 16
WIDTH = INDEX_WIDTH = 32
ROTARY = 8
PLAIN = WIDTH - ROTARY
ANGLES = (10.0 ** -np.linspace(0, 6, ROTARY // 2)).astype(np.float32)
NOISE = 0.2
"""Size of the elements of other rows; a row that is pooled has elements near 1."""

Caches = list[np.ndarray]


class Layer:
    """The state of one CSA layer with room for `tokens`, and the kernels that read and write it."""

    def __init__(self, tokens: int, formats: tuple[str, str], rng: np.random.Generator) -> None:
        self.formats, self.rng = formats, rng
        noise = [np.resize(rng.standard_normal((999, WIDTH)), (1, tokens // RATIO, WIDTH)) * NOISE for _ in range(2)]
        distinct = [narrow_rows.stored(n[:, :999].astype(np.float32), f) for n, f in zip(noise, formats, strict=True)]
        self.rows, self.index_rows = (np.resize(d, (1, tokens // RATIO, d.shape[2])) for d in distinct)
        self.rings = [np.zeros((1, 2 * RATIO, 2 * WIDTH), np.float32) for _ in range(4)]

    def feed(self, start: int, stop: int, needle: int) -> None:
        """Compress the tokens from `start` to `stop`; those of window `needle` all point one way."""
        position = np.arange(start, stop)
        inside = position // RATIO == needle

        def projections() -> list[np.ndarray]:
            kv = 0.01 * self.rng.standard_normal((1, len(position), 2 * WIDTH)).astype(np.float32)
            gate = np.zeros_like(kv)
            kv[0, inside, WIDTH : WIDTH + PLAIN] = 1  # the half that is for the token's own window
            gate[0, inside, WIDTH:] = 10
            return [kv, gate, np.zeros((RATIO, 2 * WIDTH), np.float32), np.ones(WIDTH, np.float32)]

        arguments = [
            *projections(), *self.rings[:2], self.rows, *projections(), *self.rings[2:], self.index_rows, ANGLES,
            np.array([start]), np.array([stop - start]),
        ]  # fmt: skip
        sizes = (2 * WIDTH, WIDTH, 2 * INDEX_WIDTH, INDEX_WIDTH, ROTARY, RATIO, 1e-6)
        after = run(compiled(kv_compress_pair, *sizes, *self.formats), arguments, []).inputs
        self.rings, self.rows, self.index_rows = [after[4], after[5], after[11], after[12]], after[6], after[13]

    def ask(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows that a query for the needle at `position` chooses, and what attention gives it."""
        where = [np.array([position]), np.array([1])]
        q = np.zeros((1, 1, HEADS, WIDTH), np.float32)
        q[..., :PLAIN] = 8
        index = compiled(lightning_index, HEADS, INDEX_WIDTH, RATIO, TOP_K, ROTARY, self.formats[1])
        weights = np.ones((1, 1, HEADS), np.float32)
        chosen = run(index, [q, weights, self.index_rows, *where, ANGLES], [((1, 1, TOP_K), "int64")]).outputs[0]
        kv = NOISE * self.rng.standard_normal((1, 1, WIDTH)).astype(np.float32)
        raw = np.resize(narrow_rows.stored(kv, self.formats[0]), (1, WINDOW, self.rows.shape[2]))
        sizes: Any = (HEADS, WIDTH, WINDOW, TOP_K, WIDTH**-0.5, 0, self.formats[0])
        arguments = [q, kv, raw, self.rows, chosen, np.zeros(HEADS, np.float32), *where]
        out = run(compiled(compressed_sparse_attention, *sizes), arguments, [(q.shape, "float32")]).outputs[0]
        return chosen[0, 0], out[0, 0]


@pytest.mark.parametrize("formats", [("float32", "float32"), ("fp8:8", "fp4")], ids=["float32", "fp8"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("tokens", [4096, 131072, 1048576])
def test_the_one_strong_match_is_found(tokens: int, where: str, formats: tuple[str, str]) -> None:
    rng = np.random.default_rng(tokens)
    windows = tokens // RATIO
    needle = {"first": 0, "middle": windows // 2 + 1, "last": windows - 1}[where]
    layer = Layer(tokens, formats, rng)
    value = (WIDTH / PLAIN) ** 0.5
    _, before = layer.ask(tokens - 1)
    assert np.all(before[:, :PLAIN].mean(1) < value / 2)
    cut = needle * RATIO + 2  # the second chunk has the window's last two tokens
    layer.feed(max(0, cut - 10), cut, needle)
    layer.feed(cut, min(tokens, cut + 6), needle)
    chosen, out = layer.ask(tokens - 1)
    assert chosen[0] == needle
    # All heads see the needle alone: its plain dims, pooled and normed to a mean square of 1, are the value.
    np.testing.assert_allclose(out[:, :PLAIN], value, rtol=2e-3 if formats[0] == "float32" else 0.07)


def test_a_query_before_the_window_ends_does_not_see_it() -> None:
    layer = Layer(4096, ("float32", "float32"), np.random.default_rng(1))
    layer.feed(2000, 2008, 501)  # tokens 2004-2007
    chosen, _ = layer.ask(2006)
    assert 501 not in chosen
    chosen, _ = layer.ask(2007)
    assert chosen[0] == 501
