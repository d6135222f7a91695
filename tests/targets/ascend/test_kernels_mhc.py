"""Hyper-connections: entry, exit and head, against the ops' references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.ascend.chain import EACH_DEVICE, Draw, error, gate, limits, run
from tests.targets.ascend.requirements import needs_compiler, needs_mlir
from v4c.custom_ops.mhc_head import mhc_head as head_reference
from v4c.custom_ops.mhc_post import mhc_post as post_reference
from v4c.custom_ops.mhc_pre import mhc_pre as pre_reference
from v4c.targets.ascend.kernels.mhc import mhc_head, mhc_post, mhc_pre

pytestmark = [needs_mlir]
EPS = 1e-6


def draw_pre(rows, m, width, scales=3):
    draw, logits = Draw(rows), (2 + m) * m if scales == 3 else m
    return {
        "streams": draw(rows, m, width), "fn": draw(logits, m * width, scale=(m * width) ** -0.5),
        "base": draw(logits), "scale": draw(scales),
    }  # fmt: skip


def reference_of(function, buffers, *attributes):
    streams, *rest = (torch.from_numpy(buffers[n]) for n in ("streams", "fn", "base", "scale"))
    return function(streams[None], *rest, *attributes)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 140), st.sampled_from([((4, 128), None, 20), ((2, 520), 1, 2), ((3, 80), None, 1)]))
def test_mhc_pre(rows, kind):
    shape, expected_rows, iterations = kind
    buffers = draw_pre(rows, *shape)
    programs = mhc_pre(*shape, iterations, EPS, EPS, limits(), rows=expected_rows)
    after = run(programs, {"rows": rows}, buffers)
    collapsed, post, comb = reference_of(pre_reference, buffers, iterations, EPS, EPS)
    assert error(after["collapsed"], collapsed[0]) < 1e-3
    assert error(after["post"].T, post[0]) < 1e-5
    assert error(after["comb"].T.reshape(comb[0].shape), comb[0]) < 1e-5


@pytest.mark.parametrize("expected_rows", [None, 1])
def test_mhc_head(expected_rows):
    buffers = draw_pre(70, 4, 256, scales=1)
    programs = mhc_head(4, 256, EPS, EPS, limits(), rows=expected_rows, out="float32")
    after = run(programs, {"rows": 70}, buffers)
    assert error(after["collapsed"], reference_of(head_reference, buffers, EPS, EPS)[0]) < 1e-5


def draw_post(rows, m, width):
    draw = Draw(rows)
    return {"x": draw(rows, width, dtype="float16"), "streams": draw(rows, m, width), "post": draw(m, rows),
            "comb": draw(m * m, rows)}  # fmt: skip


@pytest.mark.parametrize(("m", "width"), [(4, 128), (3, 80)])
def test_mhc_post(m, width):
    rows, buffers = 13, draw_post(13, m, width)
    after = run([mhc_post(m, width, limits())], {"rows": rows}, buffers)
    t = {n: torch.from_numpy(a.astype(np.float32)) for n, a in buffers.items()}
    comb = t["comb"].T.reshape(1, rows, m, m)
    assert error(after["mixed"], post_reference(t["x"][None], t["streams"][None], t["post"].T[None], comb)[0]) < 1e-5


@needs_compiler
@pytest.mark.parametrize("device", EACH_DEVICE)
def test_gates(device):
    at, rows = limits(device), {"rows": 3}
    gate(mhc_pre(4, 128, 3, EPS, EPS, at, rows=1), device, rows, draw_pre(3, 4, 128))
    gate(mhc_head(4, 128, EPS, EPS, at), device, rows, draw_pre(3, 4, 128, scales=1))
    gate([mhc_post(4, 128, at)], device, rows, draw_post(3, 4, 128))
