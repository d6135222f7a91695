"""The KV compressor, windows alone and overlapping, against the op's reference."""

import numpy as np
import pytest

from tests.targets.ascend.chain import EACH_DEVICE, Draw, error, gate, limits, reference, run
from tests.targets.ascend.requirements import needs_compiler, needs_mlir
from v4c.custom_ops.kv_compress import kv_compress as kv_compress_reference
from v4c.targets.ascend.kernels.compressor import kv_compress

pytestmark = [needs_mlir]
DIMS, EPS = 16, 1e-6


def draw_call(width, columns, ratio, chunk, positions, lengths, capacity=60):
    draw, batch, size = Draw(chunk), len(positions), ratio * width // columns
    buffers = {
        "kv": draw(batch, chunk, width), "gate": draw(batch, chunk, width), "bias": draw(ratio, width),
        "norm": draw(columns), "inv_freq": (10000.0 ** -(np.arange(DIMS // 2) / (DIMS // 2))).astype(np.float32),
        "state_kv": draw(batch, size, width), "state_gate": draw(batch, size, width),
        "rows": draw(batch, capacity, columns, dtype="float16"),
        "positions": np.array(positions, np.int32), "lengths": np.array(lengths, np.int32),
    }  # fmt: skip
    for row, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        buffers["state_kv"][row, position:] = np.nan
        buffers["state_gate"][row, position:] = np.nan
        buffers["kv"][row, length:] = np.nan
    return {"batch": batch, "chunk": chunk, "capacity": capacity}, buffers


CALLS = {
    "overlapping": (64, 32, 4, 13, [0, 7], [13, 9]),
    "single tokens and an idle row": (64, 32, 4, 1, [3, 4, 7], [1, 0, 1]),
    "alone, of 128": (64, 64, 128, 300, [50], [300]),
    "the last token of a window of 128": (64, 64, 128, 2, [126], [2]),
    "no window completed": (64, 32, 4, 3, [200, 9], [3, 2]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_kv_compress(call):
    width, columns, ratio, _, positions, lengths = call
    scalars, buffers = draw_call(*call)
    after = run(kv_compress(width, columns, DIMS, ratio, EPS, limits()), scalars, buffers)
    expected = kv_compress_reference(*(reference(a) for a in buffers.values()), ratio, EPS)
    assert error(after["rows"], expected[2]) < 2e-3
    size = buffers["state_kv"].shape[1]
    for row, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        live = [p % size for p in range(max(0, position + length - size), position + length)]
        for name, state in zip(("state_kv", "state_gate"), expected, strict=False):
            assert np.array_equal(after[name][row, live], state[row, live])


@needs_compiler
@pytest.mark.parametrize("device", EACH_DEVICE)
@pytest.mark.parametrize("call", [(64, 32, 4, 5, [3, 4], [5, 2]), (64, 64, 128, 3, [126], [2])], ids=["csa", "hca"])
def test_gates(device, call):
    scalars, buffers = draw_call(*call)
    gate(kv_compress(*call[:2], DIMS, call[2], EPS, limits(device)), device, scalars, buffers)
