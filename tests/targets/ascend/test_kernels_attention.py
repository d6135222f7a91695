"""The three attention ops with their rings, gathered rows and split steps, against the ops' references."""

from dataclasses import dataclass

import numpy as np
import pytest

from tests.targets.ascend.chain import EACH_DEVICE, Draw, error, gate, limits, reference, run
from tests.targets.ascend.requirements import DEVICES, needs_compiler, needs_mlir
from v4c.custom_ops.csa_attention import csa_attention
from v4c.custom_ops.hca_attention import hca_attention
from v4c.custom_ops.sliding_attention import sliding_attention
from v4c.targets.ascend.kernels.attention import AttentionSizes, attend, attention_op

pytestmark = [needs_mlir]


@dataclass
class Case:
    """One call; `positions` and `lengths` have an entry per sequence."""

    sizes: AttentionSizes
    chunk: int
    positions: list[int]
    lengths: list[int]
    capacity: int = 1

    @property
    def scalars(self):
        return {"batch": len(self.positions), "chunk": self.chunk, "capacity": self.capacity}

    def buffers(self, seed=0):
        """Random inputs, NaN wherever nothing was ever written."""
        s, draw, batch = self.sizes, Draw(seed), len(self.positions)
        half = {"dtype": s.dtype}
        buffers = {
            "q": draw(batch, self.chunk, s.heads, s.width, **half), "kv": draw(batch, self.chunk, s.width, **half),
            "window": draw(batch, s.window, s.width, **half), "sinks": draw(s.heads),
            "rows": draw(batch, self.capacity, s.width, **half),
            "positions": np.array(self.positions, np.int32), "lengths": np.array(self.lengths, np.int32),
            "indices": np.full((batch, self.chunk, max(s.chosen, 1)), -1, np.int32),
        }  # fmt: skip
        for row, (position, length) in enumerate(zip(self.positions, self.lengths, strict=True)):
            buffers["window"][row, position:] = np.nan
            buffers["rows"][row, (position + length) // (s.ratio or 4) :] = np.nan
            for token in range(self.chunk if s.chosen else 0):
                ready = min(position + token + 1, position + length) // 4
                chosen = draw.generator.permutation(ready)[: s.chosen]
                buffers["indices"][row, token, : len(chosen)] = chosen
        return buffers

    def expected(self, buffers):
        s, t = self.sizes, {n: reference(a) for n, a in buffers.items()}
        first, last = (t["q"], t["kv"], t["window"]), (t["sinks"], t["positions"], t["lengths"])
        if s.chosen:
            return csa_attention(*first, t["rows"], t["indices"], *last, s.scale)
        if s.ratio:
            return hca_attention(*first, t["rows"], *last, s.ratio, s.scale)
        return sliding_attention(*first, *last, s.scale)


def sizes(heads=4, width=32, window=16, ratio=0, chosen=0, dtype="float16"):
    return AttentionSizes(heads, width, window, width**-0.5, ratio, chosen, dtype)


CASES = {
    "sliding": Case(sizes(), 5, [3, 300], [5, 4]),
    "sliding, window of odd size": Case(sizes(window=37), 40, [0, 100], [40, 7]),
    "sliding, window of two blocks": Case(sizes(window=160), 2, [100, 500], [2, 2]),
    "hca": Case(sizes(ratio=4), 37, [9, 130], [37, 20], 80),
    "hca, more than one block": Case(sizes(ratio=4), 3, [3, 1300], [3, 0], 400),
    "csa": Case(sizes(chosen=24), 3, [30, 900], [3, 3], 300),
    "csa, nothing ready": Case(sizes(chosen=24), 2, [0, 1], [2, 1], 5),
    "csa, more than one block": Case(sizes(chosen=160), 1, [2000, 300], [1, 1], 600),
}


@pytest.mark.parametrize(("name", "splits"), [
    *((name, 1) for name in CASES), ("hca, more than one block", 3), ("csa, more than one block", 3),
    *(pytest.param(name, 3, marks=pytest.mark.slow) for name in CASES if "more" not in name),
])  # fmt: skip
def test_attention(name, splits):
    case = CASES[name]
    buffers = case.buffers()
    after = run(attention_op(case.sizes, limits(), splits=splits), case.scalars, buffers)
    out, window = case.expected(buffers)
    for row, length in enumerate(case.lengths):
        assert error(after["out"][row, :length], out[row, :length]) < 2e-3
    assert np.array_equal(after["window"], window.numpy().astype(np.float16), equal_nan=True)


def test_bfloat16():
    case = Case(sizes(chosen=24, dtype="bfloat16"), 2, [200], [2], 60)
    buffers = case.buffers()
    out = run(attention_op(case.sizes, limits()), case.scalars, buffers)["out"]
    assert error(out, case.expected(buffers)[0]) < 2e-2


def test_a_missing_index_anywhere_is_no_row():
    case = Case(sizes(chosen=24), 1, [900], [1], 300)
    buffers = case.buffers()
    buffers["indices"][0, 0, [0, 5, 23]] = -1
    out = run(attention_op(case.sizes, limits()), case.scalars, buffers)["out"]
    assert error(out, case.expected(buffers)[0]) < 2e-3


def test_what_is_counted_follows_the_context():
    hca = attend(sizes(64, 512, 128, ratio=128), limits())[0]
    scalars = {"batch": 1, "chunk": 1, "capacity": 8192}
    near, far = (hca.cube(hca.launch(scalars) | {"context": n}) for n in (0, 1 << 20))
    assert near == 2 * 64 * 128 * 512
    assert far - near == 2 * 64 * (1 << 20) / 128 * 512


@needs_compiler
@pytest.mark.parametrize("device", EACH_DEVICE)
@pytest.mark.parametrize("name", ["sliding", "hca", "csa"])
def test_gates(device, name):
    case = CASES[name]
    case = Case(case.sizes, 2, [3, 150], [2, 1], 60)
    gate(attention_op(case.sizes, limits(device)), device, case.scalars, case.buffers())


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_gates_of_split_steps(device):
    case = Case(sizes(ratio=4), 1, [1100], [1], 300)
    gate(attention_op(case.sizes, limits(device), splits=2), device, case.scalars, case.buffers())
