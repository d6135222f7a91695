"""Engram: exact hashes, gathered rows, gates and convolution, against the ops' references."""

import numpy as np
import pytest

from tests.targets.ascend.chain import EACH_DEVICE, Draw, error, gate, limits, reference, run
from tests.targets.ascend.requirements import needs_compiler, needs_mlir
from v4c.custom_ops.engram_gate_conv import engram_gate_conv as conv_reference
from v4c.custom_ops.engram_hash import engram_hash as hash_reference
from v4c.targets.ascend.kernels.engram import engram_gate_conv, engram_hash, engram_lookup

pytestmark = [needs_mlir]
PRIMES = [p for p in range(4000, 6000) if all(p % d for d in range(2, 80))]
TAPS, DILATION, EPS = 4, 3, 1e-6


def draw_hash(longest, addresses, chunk=7):
    draw, batch, vocabulary = Draw(longest), 3, 500
    primes = np.array(PRIMES[:addresses])
    buffers = {
        "input_ids": draw.whole(0, vocabulary, batch, chunk), "lookup": draw.whole(0, 300, vocabulary),
        "multipliers": draw.whole(2**61, 2**62, longest, dtype="int64") * 2 + 1, "primes": primes,
        "offsets": np.cumsum(primes) - primes, "history": draw.whole(0, 300, batch, longest - 1),
        "positions": np.array([0, 1, 50], np.int32), "lengths": np.array([chunk, 0, 1], np.int32),
    }  # fmt: skip
    return {"batch": batch, "chunk": chunk, "vocabulary": vocabulary}, buffers


@pytest.mark.parametrize(("longest", "addresses"), [(3, 16), (2, 4), (4, 12)])
def test_engram_hash(longest, addresses):
    """Multipliers are so large that products wrap around and hashes are negative."""
    scalars, buffers = draw_hash(longest, addresses)
    after = run(engram_hash(longest, addresses, 2, limits()), scalars, buffers)
    expected, history = hash_reference(*(reference(a) for a in buffers.values()), 2)
    assert np.array_equal(after["addresses"], expected)
    assert np.array_equal(after["history"], history)


@pytest.mark.parametrize("width", [64, 4, 24])
def test_engram_lookup(width):
    draw = Draw(width)
    buffers = {"table": draw(999, width, dtype="float16"), "addresses": draw.whole(0, 999, 11, 8)}
    found = run([engram_lookup(width, 8, limits())], {"rows": 11, "table_rows": 999}, buffers)["embedding"]
    assert np.array_equal(found, buffers["table"][buffers["addresses"]].reshape(11, -1))


def draw_conv(streams, width, chunk=13):
    draw, batch, wide = Draw(width), 2, streams * width
    buffers = {
        "keys": draw(batch, chunk, streams, width, dtype="float16"),
        "value": draw(batch, chunk, width, dtype="float16"),
        "streams": draw(batch, chunk, streams, width), "key_norm": draw(streams, width),
        "stream_norm": draw(streams, width), "conv_norm": draw(streams, width), "conv_weight": draw(wide, TAPS),
        "conv_state": draw(batch, (TAPS - 1) * DILATION, wide),
        "positions": np.array([4, 31], np.int32), "lengths": np.array([chunk, min(chunk, 5)], np.int32),
    }  # fmt: skip
    buffers["conv_state"][0, 4:] = np.nan
    return {"batch": batch, "chunk": chunk}, buffers


@pytest.mark.parametrize(("streams", "width"), [(4, 128), (2, 72)])
def test_engram_gate_conv(streams, width):
    scalars, buffers = draw_conv(streams, width)
    buffers["keys"][0, 0] = 0  # no direction: the gate is a half
    expected, state = conv_reference(*(reference(a) for a in buffers.values()), DILATION, EPS)
    given = buffers | {"conv_weight": np.ascontiguousarray(buffers["conv_weight"].T)}
    after = run(engram_gate_conv(streams, width, TAPS, DILATION, EPS, limits()), scalars, given)
    assert error(after["mixed"], expected) < 1e-5
    assert error(after["conv_state"], state) < 1e-5


@needs_compiler
@pytest.mark.parametrize("device", EACH_DEVICE)
def test_gates(device):
    at = limits(device)
    gate(engram_hash(3, 8, 2, at), device, *draw_hash(3, 8, chunk=2))
    draw = Draw()
    table = {"table": draw(99, 4, dtype="float16"), "addresses": draw.whole(0, 99, 2, 8)}
    gate([engram_lookup(4, 8, at)], device, {"rows": 2, "table_rows": 99}, table)
    scalars, buffers = draw_conv(4, 32, chunk=2)
    buffers["conv_weight"] = np.ascontiguousarray(buffers["conv_weight"].T)
    gate(engram_gate_conv(4, 32, TAPS, DILATION, EPS, at), device, scalars, buffers)
