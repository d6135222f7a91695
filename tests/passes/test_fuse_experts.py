"""``fuse-experts`` before and after: experts of each token gathered, all experts with a mask, Hugging Face's export."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.graphs import export, graph, left_alone, only, rewritten, same_numbers
from tests.passes.onnx_graphs import operators, run
from v4c.passes.onnx.fuse_experts import FuseExperts
from v4c.passes.onnx.fuse_router import FuseRouter

HIDDEN, WIDTH, EXPERTS, CHOSEN = 6, 4, 5, 2
CONSTANTS = (
    " ".join(f"i{n} = Constant<value_ints = [{n}]>()" for n in (0, 1, 2, 3, 4, 8, 99))
    + """
    last = Constant<value_ints = [-1]>() but_one = Constant<value_ints = [-2]>()
    high = Constant<value_float = 2.0>() low = Neg(high) zero = Constant<value_float = 0.0>()
"""
)
GATES = {
    "clip": "g = Clip(gate, , high) u = Clip(up, low, high)",
    "min and max": "g = Min(gate, high) top = Min(high, up) u = Max(top, low)",
}
PRODUCTS = {
    "gate first": "s = Sigmoid(g) silu = Mul(g, s) hidden = Mul(silu, u)",
    "up first": "s = Sigmoid(g) silu = Mul(s, g) hidden = Mul(u, silu)",
    "sigmoid last": "s = Sigmoid(g) both_g = Mul(u, g) hidden = Mul(s, both_g)",
}
SPLITS = {
    "split": "gate, up = Split<axis = -1, num_outputs = 2>(both)",
    "sizes": "sizes = Constant<value_ints = [4, 4]>() gate, up = Split<axis = -1>(both, sizes)",
    "slices": "gate = Slice(both, i0, i4, last) up = Slice(both, i4, i99, last)",
}
SWIGLU = f"{GATES['clip']} {PRODUCTS['gate first']}"


def per_token(rows: bool) -> str:
    """Weights gathered for every choice; `rows` times the column of the token."""
    k = 2 if rows else 1
    return f"""
        {CONSTANTS} wide_axes = Constant<value_ints = [{k}, {k + 2}]>()
        w1 = Gather(gate_up, indices) x_c = Unsqueeze(x, wide_axes) p1 = MatMul(w1, x_c) both = Squeeze(p1, last)
        {SPLITS["split"]} {SWIGLU}
        w2 = Gather(down, indices) h_c = Unsqueeze(hidden, last) p2 = MatMul(w2, h_c) result = Squeeze(p2, last)
        w_c = Unsqueeze(weights, last) weighted = Mul(result, w_c)
        choices = Constant<value_ints = [{k}]>() y = ReduceSum<keepdims = 0>(weighted, choices)
    """


def rows_times_transposed(rows: bool) -> str:
    """The token as a row, weights transposed: before the gather those of the first product, after it the second's."""
    k = 2 if rows else 1
    perm = [0, 1, 2, 4, 3] if rows else [0, 1, 3, 2]
    return f"""
        {CONSTANTS} wide_axes = Constant<value_ints = [{k}, {k + 1}]>()
        w1_all = Transpose<perm = [0, 2, 1]>(gate_up) w1 = Gather<axis = 0>(w1_all, indices)
        x_r = Unsqueeze(x, wide_axes) p1 = MatMul(x_r, w1) both = Squeeze(p1, but_one)
        {SPLITS["sizes"]} {GATES["min and max"]} {PRODUCTS["up first"]}
        w2_g = Gather(down, indices) w2 = Transpose<perm = {perm}>(w2_g)
        h_r = Unsqueeze(hidden, but_one) p2 = MatMul(h_r, w2) result = Squeeze(p2, but_one)
        w_c = Unsqueeze(weights, last) weighted = Mul(w_c, result)
        choices = Constant<value_ints = [-2]>() y = ReduceSum<keepdims = 0>(weighted, choices)
    """


def dense(rows: bool, routing: str = "scatter") -> str:
    """Every expert for every token, times a routing matrix."""
    k = 1 if rows else 0
    x = "x_e = Unsqueeze(x, i1)" if rows else "x_e = Identity(x)"
    perm = [0, 2, 1] if rows else [1, 0]
    matrices = {
        "scatter": "lead = Shape<end = -1>(x) size = Concat<axis = 0>(lead, experts) zeros = ConstantOfShape(size)"
        " matrix = ScatterElements<axis = -1>(zeros, indices, weights)",
        "scatter add": "lead = Shape<end = -1>(x) size = Concat<axis = 0>(lead, experts) zeros = Expand(zero, size)"
        ' matrix = ScatterElements<axis = -1, reduction = "add">(zeros, indices, weights)',
        "one hot": "pair = Constant<value_floats = [0.0, 1.0]>() hot = OneHot(indices, experts, pair)"
        " w_c = Unsqueeze(weights, last) spread = Mul(w_c, hot) matrix = ReduceSum<keepdims = 0>(spread, but_one)",
        "one hot product": "pair = Constant<value_ints = [0, 1]>() hot_i = OneHot(indices, experts, pair)"
        " hot = Cast<to = 1>(hot_i) w_r = Unsqueeze(weights, but_one) wide = MatMul(w_r, hot)"
        " matrix = Squeeze(wide, but_one)",
    }
    return f"""
        {CONSTANTS} experts = Constant<value_ints = [{EXPERTS}]>() {matrices[routing]}
        {x} w1 = Transpose<perm = [0, 2, 1]>(gate_up) both = MatMul(x_e, w1)
        {SPLITS["slices"]} {GATES["clip"]} {PRODUCTS["sigmoid last"]}
        w2 = Transpose<perm = [0, 2, 1]>(down) result = MatMul(hidden, w2)
        m_t = Transpose<perm = {perm}>(matrix) m_c = Unsqueeze(m_t, last) weighted = Mul(result, m_c)
        over = Constant<value_ints = [{k}]>() y = ReduceSum<keepdims = 0>(weighted, over)
    """


def flattened(rows: bool) -> str:
    """Hugging Face's batched form: every token repeated for each of its choices, all of them in one axis."""
    assert not rows
    return f"""
        {CONSTANTS} flat = Constant<value_ints = [-1]>() twice = Constant<value_ints = [1, 2, 1]>()
        x_1 = Unsqueeze(x, i1) x_k = Expand(x_1, twice) wide = Constant<value_ints = [-1, 6]>() x_f = Reshape(x_k, wide)
        w_f = Reshape(weights, flat) i_f = Reshape(indices, flat) i_c = Unsqueeze(i_f, last)
        w1 = GatherND(gate_up, i_c) x_c = Unsqueeze(x_f, last) p1 = MatMul(w1, x_c) both = Squeeze(p1, last)
        {SPLITS["split"]} {SWIGLU}
        w2 = GatherND(down, i_c) h_c = Unsqueeze(hidden, last) p2 = MatMul(w2, h_c) result = Squeeze(p2, last)
        w_c = Unsqueeze(w_f, last) scaled = Mul(result, w_c)
        back = Constant<value_ints = [-1, 2, 6]>() weighted = Reshape(scaled, back)
        y = ReduceSum<keepdims = 0>(weighted, i1)
    """


SPELLINGS: dict[str, Any] = {
    "per token": per_token,
    "rows": rows_times_transposed,
    "flattened": flattened,
    **{
        f"dense, {r}": lambda rows, r=r: dense(rows, r)
        for r in ("scatter", "scatter add", "one hot", "one hot product")
    },
}
CASES = [(name, rows) for name in SPELLINGS for rows in (False, True) if not (name == "flattened" and rows)]


STACKS = "float[5, 8, 6] gate_up, float[5, 6, 4] down"


def experts(body: str, rows: bool, extra: str = "", stacks: str = STACKS) -> onnx.ModelProto:
    lead = "b, s" if rows else "t"
    inputs = f"float[{lead}, 6] x, float[{lead}, 2] weights, int64[{lead}, 2] indices, {stacks}"
    return graph(inputs, f"float[{lead}, 6] y{extra}", body)


@pytest.mark.parametrize(("name", "rows"), CASES)
def test_before_and_after(name: str, rows: bool) -> None:
    model, report = rewritten(experts(SPELLINGS[name](rows), rows), FuseExperts())
    assert (report.rewritten, report.refusals) == (1, [])
    node = only(model, "GroupedExperts")
    assert node.attributes["limit"].value == 2.0
    if rows:
        assert operators(model.graph) == ["GroupedExperts"]
        assert [v.name for v in node.inputs if v is not None] == ["x", "weights", "indices", "gate_up", "down"]
    else:
        assert operators(model.graph) == ["Unsqueeze"] * 3 + ["GroupedExperts", "Squeeze"]
        assert [v.name for v in node.inputs[3:] if v is not None] == ["gate_up", "down"]
        wide = [v.producer() for v in node.inputs[:3] if v is not None]
        assert [n.inputs[0].name for n in wide if n is not None and n.inputs[0]] == ["x", "weights", "indices"]


@settings(deadline=None, max_examples=20)
@given(case=st.sampled_from(CASES), shape=st.tuples(st.integers(1, 3), st.integers(1, 4)), seed=st.integers(0, 2**32))
def test_same_numbers_with_and_without(case: tuple[str, bool], shape: tuple[int, int], seed: int) -> None:
    name, rows = case
    rng = np.random.default_rng(seed)
    lead = shape if rows else shape[:1]
    choices = np.argsort(rng.random((*lead, EXPERTS)), axis=-1)[..., :CHOSEN]
    floats = {"x": (*lead, HIDDEN), "weights": (*lead, CHOSEN), "gate_up": (EXPERTS, 2 * WIDTH, HIDDEN),
              "down": (EXPERTS, HIDDEN, WIDTH)}  # fmt: skip
    feeds = {n: rng.standard_normal(s).astype(np.float32) for n, s in floats.items()} | {"indices": choices}
    same_numbers(experts(SPELLINGS[name](rows), rows), FuseExperts(), feeds)


@pytest.mark.parametrize("product", PRODUCTS.values())
@pytest.mark.parametrize("gate", GATES.values())
@pytest.mark.parametrize("split", SPLITS.values())
def test_every_swiglu(split: str, gate: str, product: str) -> None:
    body = per_token(True).replace(SPLITS["split"], split).replace(SWIGLU, f"{gate} {product}")
    _, report = rewritten(experts(body, rows=True), FuseExperts())
    assert (report.rewritten, report.refusals) == (1, [])


def test_a_swiglu_that_is_fused_already() -> None:
    body = per_token(True).replace(SWIGLU, "hidden = v4c.ClampedSwiGLU<limit = 2.5>(gate, up)")
    model, report = rewritten(experts(body, rows=True), FuseExperts())
    assert (report.rewritten, report.refusals) == (1, [])
    assert only(model, "GroupedExperts").attributes["limit"].value == 2.5


def test_weights_stored_in_half_precision() -> None:
    """Cast after the gather, as a graph does that must not convert every expert: the op casts for itself."""
    body = per_token(True).replace(
        "w1 = Gather(gate_up, indices)", "g1 = Gather(gate_up, indices) w1 = Cast<to = 1>(g1)"
    )
    body = body.replace("w2 = Gather(down, indices)", "g2 = Gather(down, indices) w2 = Cast<to = 1>(g2)")
    proto = experts(body, rows=True, stacks=STACKS.replace("float", "float16"))
    model, report = rewritten(proto, FuseExperts())
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model.graph) == ["GroupedExperts"]


class Block(torch.nn.Module):
    """The routed experts of Hugging Face's DeepSeek-V4 behind its router, in the form it exports."""

    def __init__(self) -> None:
        from transformers import DeepseekV4Config
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

        super().__init__()
        config = DeepseekV4Config(
            vocab_size=20,
            hidden_size=16,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            moe_intermediate_size=8,
        )
        config._experts_implementation = "batched_mm"
        self.router, self.experts = modeling.DeepseekV4TopKRouter(config), modeling.DeepseekV4Experts(config)
        generator = torch.Generator().manual_seed(0)
        for tensor in (*self.parameters(), self.router.e_score_correction_bias):
            torch.nn.init.normal_(tensor, generator=generator)

    def forward(self, hidden: Any) -> Any:
        _, weights, indices = self.router(hidden)
        return self.experts(hidden.view(-1, hidden.shape[-1]), indices, weights).view(hidden.shape)


def test_hugging_face_experts_are_recovered(tmp_path_factory: pytest.TempPathFactory) -> None:
    proto = export(Block(), (torch.randn(2, 3, 16),), tmp_path_factory.mktemp("hf"))
    model, report = rewritten(proto, FuseRouter())
    assert (report.rewritten, report.refusals) == (1, [])
    report = FuseExperts().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    left = operators(model.graph)
    assert (left.count("TopKRoute"), left.count("GroupedExperts")) == (1, 1)
    assert not {"MatMul", "GatherND", "Sigmoid", "Clip", "ReduceSum", "Expand"} & set(left)
    feeds = {"hidden": np.random.default_rng(0).standard_normal((3, 5, 16)).astype(np.float32)}
    (before,), (after,) = run(proto, feeds), run(model, feeds)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * np.abs(before).max())


TOKENS, DENSE = per_token(True), dense(rows=True)
NEAR_MISSES = {
    "no clamps": (TOKENS.replace(GATES["clip"], "g = Identity(gate) u = Identity(up)"), "constant limits"),
    "other limit": (TOKENS.replace("low = Neg(high)", "low = Constant<value_float = -1.0>()"), "up from -1.0 to 2.0"),
    "up first": (TOKENS.replace("gate, up = Split", "up, gate = Split"), "the gate in columns 0 ... 4 and"),
    "one half twice": (TOKENS.replace(SPLITS["split"], SPLITS["slices"].replace("i4, i99", "i0, i4")),
                       "the gate in columns 0 ... 4 and up in those after"),
    "keepdims": (TOKENS.replace("y = ReduceSum<keepdims = 0>(weighted, choices)",
                 "kept = ReduceSum(weighted, choices) y = Squeeze(kept, choices)"), "a sum of rank 4"),
    "sum over tokens": (TOKENS.replace("choices = Constant<value_ints = [2]>", "choices = Constant<value_ints = [1]>"),
                        "summed over the choices"),
    "scatter over something": (DENSE.replace("zeros = ConstantOfShape(size)",
                               "one = Constant<value_float = 1.0>() zeros = Expand(one, size)"), "over zeros"),
    "scatter along tokens": (DENSE.replace("Elements<axis = -1>", "Elements<axis = 1>"), "along the experts"),
    "weights of another shape": (DENSE.replace("matrix = ScatterElements<axis = -1>(zeros, indices, weights)",
                                 "matrix = Identity(zeros)"), "routing weights scattered over the experts"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone_with_a_reason(name: str) -> None:
    body, reason = NEAR_MISSES[name]
    shape = "float[b, 2, 6] y" if name == "sum over tokens" else None
    proto = experts(body, rows=True)
    if shape:
        proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", 1, ["b", 2, 6]))
    (refusal,) = left_alone(proto, FuseExperts())
    assert reason in refusal


def test_weights_stored_transposed_are_refused() -> None:
    body = rows_times_transposed(True).replace(
        "w1_all = Transpose<perm = [0, 2, 1]>(gate_up)", "w1_all = Identity(gate_up)"
    )
    inputs = (
        "float[b, s, 6] x, float[b, s, 2] weights, int64[b, s, 2] indices, float[5, 6, 8] gate_up, float[5, 6, 4] down"
    )
    (refusal,) = left_alone(graph(inputs, "float[b, s, 6] y", body), FuseExperts())
    assert "expected x [.., D] times gate_up [E, 2F, D] of the chosen experts, or of all" in refusal


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        (per_token(True), "float[b, s, 6] x, float[b, s, 1] weights, int64[b, s, 2] indices", "of the same tokens"),
        (per_token(True), "float[b, 1, 6] x, float[b, s, 2] weights, int64[b, s, 2] indices", "of the same tokens"),
    ],
)
def test_what_the_spelling_broadcasts_is_refused(body: str, inputs: str, reason: str) -> None:
    (refusal,) = left_alone(graph(f"{inputs}, {STACKS}", "float[b, s, 6] y", body), FuseExperts())
    assert reason in refusal


def test_stacks_of_other_sizes_are_refused() -> None:
    stacks = STACKS.replace("float[5, 6, 4] down", "float[7, 6, 4] down")
    (refusal,) = left_alone(experts(TOKENS, rows=True, stacks=stacks), FuseExperts())
    assert "expected gate_up and down of as many experts as are routed" in refusal


def test_experts_of_other_indices_are_refused() -> None:
    body = per_token(True).replace("w2 = Gather(down, indices)", "w2 = Gather(down, others)")
    (refusal,) = left_alone(experts(body, rows=True, stacks=f"{STACKS}, int64[b, s, 2] others"), FuseExperts())
    assert "expected the SwiGLU times down [E, D, F] of the same experts" in refusal


def test_what_is_read_elsewhere_is_left_alone_with_a_reason() -> None:
    (refusal,) = left_alone(experts(TOKENS, True, ", float[b, s, 2, 4] hidden"), FuseExperts())
    assert "expected hidden to be read here only" in refusal


def test_other_sums_are_no_experts() -> None:
    body = "axes = Constant<value_ints = [1]>() z = Mul(x, x) y = ReduceSum<keepdims = 0>(z, axes)"
    assert left_alone(graph("float[b, s, 6] x", "float[b, 6] y", body), FuseExperts()) == []
