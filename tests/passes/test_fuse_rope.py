"""``fuse-rope`` before and after: our own body inlined, Hugging Face's helpers exported, hand-written variants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import build_model, spec
from tests.passes.graphs import export, graph, left_alone, only, rewritten, same_numbers
from tests.passes.onnx_graphs import operators, run
from v4c.custom_ops.trailing_rope import TRAILING_ROPE
from v4c.passes.onnx.fuse_rope import FuseRope

WIDTH, ROTATED, HEADS = 24, 8, 5
PAIRS = ROTATED // 2
INPUTS = {
    "heads last": f"float[b, s, {HEADS}, {WIDTH}] x",
    "heads first": f"float[b, {HEADS}, s, {WIDTH}] x",
    "no heads": f"float[b, s, {WIDTH}] x",
}
SHAPES = {layout: text.removesuffix(" x") for layout, text in INPUTS.items()}
SPEEDS = "int64[b] positions, float[4] inv_freq"

NUMBERS = (
    " ".join(f"i{n} = Constant<value_ints = [{n}]>()" for n in (0, 1, 2, 8, 16, 17, 24))
    + """
    last = Constant<value_ints = [-1]>() zero = Constant<value_int = 0>() one = Constant<value_int = 1>()
"""
)


def angles(token_axis: int = 1) -> str:
    return f"""
        chunk = Shape<start = {token_axis}, end = {token_axis + 1}>(x) n = Squeeze(chunk)
        steps = Range(zero, n, one) first = Unsqueeze(positions, i1) ids = Add(first, steps)
        column = Unsqueeze(ids, i2) float_ids = Cast<to = 1>(column) angles = Mul(float_ids, inv_freq)
        cos = Cos(angles) sin = Sin(angles)
    """


def placed(layout: str, name: str) -> str:
    """A table with the axis that is broadcast over heads."""
    axis = {"heads last": "i2", "heads first": "i1"}.get(layout)
    return f"{name}_b = Unsqueeze({name}, {axis})" if axis else f"{name}_b = Identity({name})"


def halves(layout: str, cut: str) -> str:
    """One half at a time, stacked: even dims real, odd dims imaginary."""
    parts = {
        "slices of x": "even = Slice(x, i16, i24, last, i2) odd = Slice(x, i17, i24, last, i2)",
        "slices of the rest": "rest = Slice(x, i16, i24, last) even = Slice(rest, i0, i8, last, i2)"
        " odd = Slice(rest, i1, i8, last, i2)",
        "columns": "rest = Slice(x, i16, i24, last) lead = Shape<end = -1>(x) four = Constant<value_ints = [4]>()"
        " paired = Concat<axis = 0>(lead, four, i2) both = Reshape(rest, paired)"
        " even = Gather<axis = -1>(both, zero) odd = Gather<axis = -1>(both, one)",
    }[cut]
    return f"""
        {placed(layout, "cos")} {placed(layout, "sin")} kept = Slice(x, i0, i16, last) {parts}
        ec = Mul(even, cos_b) os = Mul(sin_b, odd) oc = Mul(odd, cos_b) es = Mul(even, sin_b)
        real = Sub(ec, os) imag = Add(es, oc)
        real_c = Unsqueeze(real, last) imag_c = Unsqueeze(imag, last) stack = Concat<axis = -1>(real_c, imag_c)
        shape_lead = Shape<end = -1>(x) target = Concat<axis = 0>(shape_lead, i8) pairs = Reshape(stack, target)
        y = Concat<axis = -1>(kept, pairs)
    """


def whole(layout: str, cut: str) -> str:
    """Hugging Face's: every angle twice in a row, x * cos + rotate(x) * sin."""
    rest = "kept, rest = Split<axis = -1>(x, sizes)" if cut == "split" else (
        "kept = Slice(x, i0, i16, last) rest = Slice(x, i16, i24, last)"
    )  # fmt: skip
    return f"""
        sizes = Constant<value_ints = [16, 8]>() twice = Constant<value_ints = [1, 1, 1, 2]>()
        flat = Constant<value_ints = [0, 0, -1]>()
        cos_c = Unsqueeze(cos, last) cos_2 = Expand(cos_c, twice) cos_w = Reshape(cos_2, flat) {placed(layout, "cos_w")}
        sin_c = Unsqueeze(sin, last) sin_2 = Expand(sin_c, twice) sin_w = Reshape(sin_2, flat) {placed(layout, "sin_w")}
        {rest}
        even = Slice(rest, i0, i8, last, i2) odd = Slice(rest, i1, i8, last, i2) back = Neg(odd)
        back_c = Unsqueeze(back, last) even_c = Unsqueeze(even, last) stack = Concat<axis = -1>(back_c, even_c)
        shape_lead = Shape<end = -1>(x) target = Concat<axis = 0>(shape_lead, i8) turned = Reshape(stack, target)
        a = Mul(rest, cos_w_b) b = Mul(turned, sin_w_b) pairs = Add(a, b)
        y = Concat<axis = -1>(kept, pairs)
    """


SPELLINGS = {
    **{f"halves, {cut}": (halves, cut) for cut in ("slices of x", "slices of the rest", "columns")},
    **{f"whole, {cut}": (whole, cut) for cut in ("slices", "split")},
}
AROUND = {"heads last": [], "heads first": ["Transpose"], "no heads": ["Unsqueeze"]}
AFTER = {"heads last": [], "heads first": ["Transpose"], "no heads": ["Squeeze"]}


def spelled(spelling: str, layout: str, back: bool = False) -> onnx.ModelProto:
    write, cut = SPELLINGS[spelling]
    tables = angles(2 if layout == "heads first" else 1)
    if back:
        tables = tables.replace("sin = Sin(angles)", "forward = Sin(angles) sin = Neg(forward)")
    return graph(f"{INPUTS[layout]}, {SPEEDS}", f"{SHAPES[layout]} y", NUMBERS + tables + write(layout, cut))


def check(proto: onnx.ModelProto, sign: float, layout: str) -> None:
    model, report = rewritten(proto, FuseRope())
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model.graph) == [*AROUND[layout], "TrailingRope", *AFTER[layout]]
    node = only(model, "TrailingRope")
    assert node.attributes["sign"].value == sign
    assert [v.name for v in node.inputs[1:] if v is not None] == ["positions", "inv_freq"]


@pytest.mark.parametrize("layout", INPUTS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_before_and_after(spelling: str, layout: str) -> None:
    check(spelled(spelling, layout), 1.0, layout)
    check(spelled(spelling, layout, back=True), -1.0, layout)


@settings(deadline=None, max_examples=20)
@given(
    spelling=st.sampled_from(list(SPELLINGS)),
    layout=st.sampled_from(list(INPUTS)),
    back=st.booleans(),
    batch=st.integers(1, 3),
    chunk=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_same_numbers_with_and_without(
    spelling: str, layout: str, back: bool, batch: int, chunk: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = {"heads last": (chunk, HEADS), "heads first": (HEADS, chunk), "no heads": (chunk,)}[layout]
    feeds: dict[str, np.ndarray] = {
        "x": rng.standard_normal((batch, *shape, WIDTH)).astype(np.float32),
        "positions": rng.integers(0, 10_000, batch),
        "inv_freq": rng.uniform(0, 1, PAIRS).astype(np.float32),
    }
    same_numbers(spelled(spelling, layout, back), FuseRope(), feeds)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_our_own_body_is_recovered(sign: float) -> None:
    specs = {"x": spec("b", "s", HEADS, WIDTH), "positions": spec("b", dtype="int64"), "inv_freq": spec(PAIRS)}
    proto = onnx.inliner.inline_local_functions(build_model(TRAILING_ROPE, specs, {"sign": sign}))
    assert len(proto.graph.node) > 20
    model, report = rewritten(proto, FuseRope())
    assert (report.rewritten, report.refusals) == (1, [])
    (node,) = model.graph
    assert (node.op_type, node.attributes["sign"].value) == ("TrailingRope", sign)
    assert [v.name for v in node.inputs if v is not None] == ["x", "positions", "inv_freq"]


class Rotations(torch.nn.Module):
    """What an attention of Hugging Face's DeepSeek-V4 does: queries and keys forward, outputs back, one table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.rand(PAIRS))

    def forward(self, q: Any, kv: Any, out: Any, positions: Any) -> tuple[Any, ...]:
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

        position_ids = positions[:, None] + torch.arange(q.shape[1])
        freqs = position_ids[..., None].float() * self.inv_freq
        cos, sin = freqs.cos() * 1.0, freqs.sin() * 1.0
        turned = [apply_rotary_pos_emb(x.transpose(1, 2), cos, sin) for x in (q, kv)]
        return (*turned, apply_rotary_pos_emb(out, cos, -sin, unsqueeze_dim=2))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """`Rotations` as ``torch.onnx.export(dynamo=True)`` leaves it."""
    arguments = (*(torch.randn(2, 3, heads, WIDTH) for heads in (HEADS, 1, HEADS)), torch.tensor([3, 5]))
    return export(Rotations(), arguments, tmp_path_factory.mktemp("hf"))


def test_hugging_face_rotations_are_recovered(exported: onnx.ModelProto) -> None:
    model, report = rewritten(exported, FuseRope())
    assert (report.rewritten, report.refusals) == (3, [])
    ropes = [n for n in model.graph if n.op_type == "TrailingRope"]
    assert [n.attributes["sign"].value for n in ropes] == [1.0, 1.0, -1.0]
    assert set(operators(model.graph)) <= {"TrailingRope", "Transpose"}
    sources = [n.inputs[0].name for n in ropes if n.inputs[0] is not None]
    assert sources == ["q", "kv", "out"], "transposes before the rotation are undone, not doubled"


def test_hugging_face_numbers(exported: onnx.ModelProto) -> None:
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {n: rng.standard_normal((3, 4, h, WIDTH)).astype(np.float32) for n, h in
             (("q", HEADS), ("kv", 1), ("out", HEADS))}  # fmt: skip
    feeds["positions"] = rng.integers(0, 1000, 3)
    model, _ = rewritten(exported, FuseRope())
    pairs = zip(run(exported, feeds), run(model, feeds), strict=True)
    for before, after in pairs:
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


PLAIN = NUMBERS + angles() + halves("heads last", "slices of x")
HF = NUMBERS + angles() + whole("heads last", "slices")
HALF_SPLIT = PLAIN.replace(
    "even = Slice(x, i16, i24, last, i2)", "i20 = Constant<value_ints = [20]>() even = Slice(x, i16, i20, last)"
)
HALF_SPLIT = HALF_SPLIT.replace("odd = Slice(x, i17, i24, last, i2)", "odd = Slice(x, i20, i24, last)")
JOINED = PLAIN.replace("pairs = Reshape(stack, target)", "pairs = Concat<axis = -1>(real, imag)")
HF_HALVES = HF.replace("cos_w = Reshape(cos_2, flat)", "cos_w = Concat<axis = -1>(cos, cos)").replace(
    "sin_w = Reshape(sin_2, flat)", "sin_w = Concat<axis = -1>(sin, sin)"
)
NEAR_MISSES = {
    "halves of x": (HALF_SPLIT, "pairs (i, i + 4), a half-split rotation"),
    "halves of the result": (JOINED, "halves joined end to end (a half-split rotation)"),
    "angles joined": (HF_HALVES, "angles joined end to end"),
    "scaled": (PLAIN.replace("cos = Cos(angles)", "k = Constant<value_float = 1.1>() c = Cos(angles) cos = Mul(c, k)"),
               "cosines and sines of amplitude 1"),
    "other sign": (PLAIN.replace("Sub(ec, os)", "Add(ec, os)"), "a rotation of every pair by its angle"),
    "two cosines": (PLAIN.replace("sin = Sin(angles)", "sin = Cos(angles)"), "a cosine and a sine of the same angles"),
    "other angles": (PLAIN.replace("sin = Sin(angles)", "double = Add(inv_freq, inv_freq) fast = Mul(float_ids, double)"
                                   " sin = Sin(fast)"), "a cosine and a sine of the same angles"),
    "other dims kept": (PLAIN.replace("Slice(x, i0, i16, last)", "Slice(x, i8, i24, last)"), "dims 0 ... 16 of x kept"),
    "leading dims": (PLAIN.replace("(kept, pairs)", "(pairs, kept)"), "the leading ones"),
    "another count": (PLAIN.replace("Shape<start = 1, end = 2>(x)", "Shape<start = 0, end = 1>(inv_freq)"),
                      "positions for every row and token"),
    "one angle for all pairs": (PLAIN.replace("Mul(float_ids, inv_freq)", "Mul(float_ids, slow)").replace(
        "angles = Mul", "slow = Slice(inv_freq, i0, i1) angles = Mul"), "an angle for each of 4 pairs"),
    "every second position": (PLAIN.replace("Range(zero, n, one)", "Range(zero, n2, two)").replace(
        "steps =", "two = Constant<value_int = 2>() n2 = Mul(n, two) steps ="), "a Range from 0 by 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone_with_a_reason(name: str) -> None:
    body, reason = NEAR_MISSES[name]
    layout = INPUTS["heads last"]
    (refusal,) = left_alone(graph(f"{layout}, {SPEEDS}", f"float[b, s, {HEADS}, {WIDTH}] y", body), FuseRope())
    assert reason in refusal


def test_one_position_for_all_rows_is_refused() -> None:
    inputs = f"{INPUTS['heads last']}, int64[1] positions, float[4] inv_freq"
    (refusal,) = left_alone(graph(inputs, f"float[b, s, {HEADS}, {WIDTH}] y", PLAIN), FuseRope())
    assert "expected positions for every row and token, ['b', 's'], found [1, 's']" in refusal


def test_positions_that_are_given_are_refused() -> None:
    body = PLAIN.replace("ids = Add(first, steps)", "").replace("steps = Range(zero, n, one)", "")
    inputs = f"{INPUTS['heads last']}, int64[b] positions, int64[b, s] ids, float[4] inv_freq"
    (refusal,) = left_alone(graph(inputs, f"float[b, s, {HEADS}, {WIDTH}] y", body), FuseRope())
    assert "expected positions [B] + arange, or speeds [R / 2], found ids" in refusal


def test_what_is_read_elsewhere_is_left_alone_with_a_reason() -> None:
    outputs = f"float[b, s, {HEADS}, {WIDTH}] y, float[b, s, {HEADS}, 4] real"
    (refusal,) = left_alone(graph(f"{INPUTS['heads last']}, {SPEEDS}", outputs, PLAIN), FuseRope())
    assert "expected real to be read here only" in refusal


def test_other_joins_are_no_rotations() -> None:
    body = "i0 = Constant<value_ints = [0]>() i16 = Constant<value_ints = [16]>() last = Constant<value_ints = [-1]>()"
    body += " kept = Slice(x, i0, i16, last) y = Concat<axis = -1>(kept, x)"
    assert left_alone(graph(INPUTS["no heads"], "float[b, s, 40] y", body), FuseRope()) == []
