"""``fuse-router`` before and after: our own bodies inlined, Hugging Face's routers exported, hand-written variants."""

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
from v4c.custom_ops.hash_route import HASH_ROUTE
from v4c.custom_ops.topk_route import TOPK_ROUTE
from v4c.passes.onnx.fuse_router import FuseRouter

EXPERTS, CHOSEN, VOCABULARY = 8, 3, 20
CONSTANTS = """
    k = Constant<value_ints = [3]>() last = Constant<value_ints = [-1]>() tiny = Constant<value_float = 1e-20>()
    scale = Constant<value_float = 1.5>() one = Constant<value_float = 1.0>() limit = Constant<value_float = 20.0>()
"""
SOFTPLUS = {
    "softplus": "soft = Softplus(logits)",
    "log1p": "e = Exp(logits) more = Add(one, e) soft = Log(more)",
    "threshold": "s = Softplus(logits) high = Greater(logits, limit) soft = Where(high, logits, s)",
}
CHOICES = {
    "top-k": "biased = Add(scores, bias) best, indices = TopK(biased, k)",
    "top-k, bias first": "biased = Add(bias, scores) best, indices = TopK<sorted = 1>(biased, k)",
    "hash": "indices = Gather(table, ids)",
    "hash, gathernd": "column = Unsqueeze(ids, last) indices = GatherND(table, column)",
}
SUMS = {
    "plain": "total = ReduceSum(chosen, last) share = Div(chosen, total)",
    "tiny": "sum = ReduceSum(chosen, last) total = Add(sum, tiny) share = Div(chosen, total)",
}
SCALES = {
    "right": "weights = Mul(share, scale)",
    "left": "weights = Mul(scale, share)",
    "none": "weights = Identity(share)",
}
LEADS = {"rows": "b, s", "flat": "t"}


def inputs(choice: str, lead: str) -> str:
    others = f"int64[{lead}] ids, int64[{VOCABULARY}, {CHOSEN}] table" if "hash" in choice else f"float[{EXPERTS}] bias"
    return f"float[{lead}, {EXPERTS}] logits, {others}"


def outputs(lead: str) -> str:
    return f"float[{lead}, {CHOSEN}] weights, int64[{lead}, {CHOSEN}] indices"


def spelled(softplus: str, choice: str, total: str = "tiny", scale: str = "right") -> str:
    return f"""
        {CONSTANTS} {SOFTPLUS[softplus]} scores = Sqrt(soft) {CHOICES[choice]}
        chosen = GatherElements<axis = -1>(scores, indices) {SUMS[total]} {SCALES[scale]}
    """


def router(choice: str, lead: str, body: str) -> onnx.ModelProto:
    return graph(inputs(choice, lead), outputs(lead), body)


@pytest.mark.parametrize("lead", LEADS.values())
@pytest.mark.parametrize("total", SUMS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("softplus", SOFTPLUS)
def test_before_and_after(softplus: str, choice: str, total: str, lead: str) -> None:
    model, report = rewritten(router(choice, lead, spelled(softplus, choice, total)), FuseRouter())
    assert (report.rewritten, report.refusals) == (1, [])
    op_type = "HashRoute" if "hash" in choice else "TopKRoute"
    node = only(model, op_type)
    assert node.attributes["scaling"].value == 1.5
    if lead == "t":
        widened = 2 if op_type == "HashRoute" else 1
        assert operators(model.graph) == ["Unsqueeze"] * widened + [op_type] + ["Squeeze"] * 2
        return
    assert operators(model.graph) == [op_type]
    expected = ["logits", "ids", "table"] if op_type == "HashRoute" else ["logits", "bias"]
    assert [v.name for v in node.inputs if v is not None] == expected
    assert [v.name for v in node.outputs] == ["weights", "indices"]
    if op_type == "TopKRoute":
        assert node.attributes["top_k"].value == CHOSEN


def test_no_scaling_is_scaling_by_one() -> None:
    model, report = rewritten(router("hash", "b, s", spelled("softplus", "hash", scale="none")), FuseRouter())
    assert report.rewritten == 1
    assert operators(model.graph) == ["HashRoute", "Identity"]
    assert only(model, "HashRoute").attributes["scaling"].value == 1.0


def feeds_for(choice: str, shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    feeds: dict[str, np.ndarray] = {"logits": (4 * rng.standard_normal((*shape, EXPERTS))).astype(np.float32)}
    if "hash" in choice:
        feeds["ids"] = rng.integers(0, VOCABULARY, shape)
        feeds["table"] = rng.integers(0, EXPERTS, (VOCABULARY, CHOSEN))
    else:
        feeds["bias"] = rng.standard_normal(EXPERTS).astype(np.float32)
    return feeds


@settings(deadline=None, max_examples=20)
@given(
    softplus=st.sampled_from(list(SOFTPLUS)),
    choice=st.sampled_from(list(CHOICES)),
    total=st.sampled_from(list(SUMS)),
    scale=st.sampled_from(list(SCALES)),
    shape=st.sampled_from([(1, 1), (2, 3), (3, 1), (1,), (5,)]),
    seed=st.integers(0, 2**32),
)
def test_same_numbers_with_and_without(
    softplus: str, choice: str, total: str, scale: str, shape: tuple[int, ...], seed: int
) -> None:
    lead = LEADS["rows" if len(shape) == 2 else "flat"]
    proto = router(choice, lead, spelled(softplus, choice, total, scale))
    same_numbers(proto, FuseRouter(), feeds_for(choice, shape, np.random.default_rng(seed)))


def test_our_own_bodies_are_recovered() -> None:
    logits, ids = spec("b", "s", EXPERTS), spec("b", "s", dtype="int64")
    learned = build_model(TOPK_ROUTE, {"logits": logits, "bias": spec(EXPERTS)}, {"top_k": CHOSEN, "scaling": 1.5})
    table = spec(VOCABULARY, CHOSEN, dtype="int64")
    hashed = build_model(HASH_ROUTE, {"logits": logits, "input_ids": ids, "table": table}, {"scaling": 2.5})
    for proto, op, attributes in (
        (learned, TOPK_ROUTE, {"top_k": CHOSEN, "scaling": 1.5}),
        (hashed, HASH_ROUTE, {"scaling": 2.5}),
    ):
        model, report = rewritten(onnx.inliner.inline_local_functions(proto), FuseRouter())
        assert (report.rewritten, report.refusals) == (1, [])
        (node,) = model.graph
        assert node.op_type == op.name
        assert [v.name for v in node.inputs if v is not None] == list(op.inputs)
        assert {n: a.value for n, a in node.attributes.items()} == attributes


class Routers(torch.nn.Module):
    """The two routers of Hugging Face's DeepSeek-V4, on the same tokens."""

    def __init__(self) -> None:
        from transformers import DeepseekV4Config
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

        super().__init__()
        config = DeepseekV4Config(
            vocab_size=VOCABULARY, hidden_size=16, n_routed_experts=EXPERTS, num_experts_per_tok=CHOSEN
        )
        self.learned, self.hashed = modeling.DeepseekV4TopKRouter(config), modeling.DeepseekV4HashRouter(config)
        generator = torch.Generator().manual_seed(0)
        for tensor in (self.learned.weight, self.hashed.weight, self.learned.e_score_correction_bias):
            torch.nn.init.normal_(tensor, generator=generator)
        self.hashed.tid2eid.random_(0, EXPERTS, generator=generator)

    def forward(self, hidden: Any, input_ids: Any) -> tuple[Any, ...]:
        return (*self.learned(hidden), *self.hashed(hidden, input_ids))


def test_hugging_face_routers_are_recovered(tmp_path_factory: pytest.TempPathFactory) -> None:
    arguments = (torch.randn(2, 3, 16), torch.randint(0, VOCABULARY, (2, 3)))
    proto = export(Routers(), arguments, tmp_path_factory.mktemp("hf"))
    model, report = rewritten(proto, FuseRouter())
    assert (report.rewritten, report.refusals) == (2, [])
    assert only(model, "TopKRoute").attributes["top_k"].value == CHOSEN
    assert not {"Softplus", "TopK", "GatherElements", "Where", "Div"} & set(operators(model.graph))
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {"hidden": rng.standard_normal((3, 5, 16)).astype(np.float32)}
    feeds["input_ids"] = rng.integers(0, VOCABULARY, (3, 5))
    before, after = run(proto, feeds), run(model, feeds)
    # The export leaves the order of the chosen experts open, the op does not.
    order, sorted_order = before[2].argsort(-1), after[2].argsort(-1)
    for old, new in zip(before[1:3], after[1:3], strict=True):
        old, new = np.take_along_axis(old, order, -1), np.take_along_axis(new, sorted_order, -1)
        np.testing.assert_allclose(new, old, rtol=1e-5)
    for old, new in zip((before[0], *before[3:]), (after[0], *after[3:]), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5)


def test_what_reads_the_choice_early_reads_the_op() -> None:
    """The experts' weights may be gathered by the indices before the routing weights are computed."""
    body = f"{CONSTANTS} two = Constant<value_int = 2>() {CHOICES['hash']} flags = Mod(indices, two)"
    body += spelled("softplus", "hash").replace(CONSTANTS, "").replace(CHOICES["hash"], "")
    proto = graph(inputs("hash", "b, s"), f"{outputs('b, s')}, int64[b, s, {CHOSEN}] flags", body)
    model, report = rewritten(proto, FuseRouter())
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model.graph) == ["HashRoute", "Mod"]


LEARNED, HASHED = spelled("softplus", "top-k"), spelled("softplus", "hash")
NEAR_MISSES = {
    "sigmoid scores": ("top-k", LEARNED.replace("scores = Sqrt(soft)", "scores = Sigmoid(logits)"), "found Sigmoid"),
    "root of exp": ("top-k", LEARNED.replace("Softplus(logits)", "Exp(logits)"), "found Sqrt of Exp"),
    "early threshold": ("hash", spelled("threshold", "hash").replace("20.0", "2.0"), "found Sqrt of Where"),
    "smallest": ("top-k", LEARNED.replace("TopK(", "TopK<largest = 0>("), "expected the largest scores chosen"),
    "no bias": ("top-k", LEARNED.replace("TopK(biased", "TopK(scores").replace("biased = Add(scores, bias)", ""),
                "expected a choice by the scores plus a bias"),
    "bias on logits": ("top-k", LEARNED.replace("Add(scores, bias)", "Add(logits, bias)"), "by the scores plus a bias"),
    "large addend": ("hash", HASHED.replace("1e-20", "1e-3"), "expected at most 1e-20 added to the sum"),
    "sum of all": ("hash", HASHED.replace("last = Constant<value_ints = [-1]>", "last = Constant<value_ints = [1]>"),
                   "expected a sum over the chosen experts"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone_with_a_reason(name: str) -> None:
    choice, body, reason = NEAR_MISSES[name]
    (refusal,) = left_alone(router(choice, "b, s", body), FuseRouter())
    assert reason in refusal


@pytest.mark.parametrize(
    ("extra", "value"), [("[b, s, 8] scores", "scores"), ("[b, s, 3] chosen", "chosen"), ("[b, s, 3] best", "best")]
)
def test_what_is_read_elsewhere_is_left_alone_with_a_reason(extra: str, value: str) -> None:
    proto = graph(inputs("top-k", "b, s"), f"{outputs('b, s')}, float{extra}", LEARNED)
    (refusal,) = left_alone(proto, FuseRouter())
    assert f"expected {value} to be read here only" in refusal


def test_ids_of_other_tokens_are_refused() -> None:
    given = inputs("hash", "b, s").replace("int64[b, s] ids", "int64[b, 1] ids")
    proto = graph(given, outputs("b, 1"), HASHED)
    (refusal,) = left_alone(proto, FuseRouter())
    assert "expected an int64 table [V, K] and an int64 id for every token" in refusal


def test_scores_that_are_not_normalised_are_no_router() -> None:
    body = LEARNED.replace(SUMS["tiny"], "share = Identity(chosen)")
    assert left_alone(router("top-k", "b, s", body), FuseRouter()) == []
