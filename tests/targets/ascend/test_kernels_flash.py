"""Programs at the dimensions of V4-Flash and V4-Pro are accepted for both devices; nothing is run."""

import pytest

from tests.targets.ascend.chain import accept, limits
from tests.targets.ascend.requirements import DEVICES, needs_compiler
from v4c.frontend.presets import preset
from v4c.targets.ascend.kernels.attention import AttentionSizes, attention_op
from v4c.targets.ascend.kernels.compressor import kv_compress
from v4c.targets.ascend.kernels.engram import engram_gate_conv, engram_hash, engram_lookup
from v4c.targets.ascend.kernels.experts import ExpertSizes, grouped_experts
from v4c.targets.ascend.kernels.index import index_scores
from v4c.targets.ascend.kernels.mhc import mhc_head, mhc_post, mhc_pre
from v4c.targets.ascend.kernels.norms import rms_norm
from v4c.targets.ascend.kernels.products import linear, linear_fp8, quantise_rows
from v4c.targets.ascend.kernels.rope import rope_angles, trailing_rope
from v4c.targets.ascend.kernels.routes import hash_route, topk_route
from v4c.targets.ascend.kernels.swiglu import add, swiglu
from v4c.targets.ascend.kernels.top_k import index_top_k

pytestmark = [needs_compiler]
STEP = 1
"""Rows of a decode step; None stands for a prompt's chunk."""


def products(c, rows):
    """Outputs, inputs and groups of every product of the model."""
    d, heads = c.hidden_size, c.num_attention_heads * c.head_dim
    engram = c.engram.embedding_width if c.engram else 0
    shapes = [
        (c.q_lora_rank, d, 1), (heads, c.q_lora_rank, 1), (c.head_dim, d, 1), (2 * c.head_dim, d, 1),
        (2 * c.index_head_dim, d, 1), (c.index_n_heads * c.index_head_dim, c.q_lora_rank, 1), (c.index_n_heads, d, 1),
        (c.o_lora_rank, heads // c.o_groups, c.o_groups), (d, c.o_groups * c.o_lora_rank, 1),
        (c.moe_intermediate_size, d, 1), (d, c.moe_intermediate_size, 1), (c.n_routed_experts, d, 1),
        (c.vocab_size, d, 1), *([(c.hc_mult * d, engram, 1), (d, engram, 1)] if engram else []),
    ]  # fmt: skip
    return [(n, k, groups, rows) for n, k, groups in shapes]


def attentions(c, dtype):
    base = (c.num_attention_heads, c.head_dim, c.sliding_window, c.head_dim**-0.5)
    return [AttentionSizes(*base, dtype=dtype), AttentionSizes(*base, ratio=c.hca_ratio, dtype=dtype),
            AttentionSizes(*base, chosen=c.index_topk, dtype=dtype)]  # fmt: skip


def programs(c, at, rows, dtype):
    """Every program of the model, attention apart."""
    d, m, eps, half = c.hidden_size, c.hc_mult, c.rms_norm_eps, {"dtype": dtype}
    yield from (linear(n, k, at, groups=g, rows=r, dtype=dtype, out=dtype) for n, k, g, r in products(c, rows))
    yield from (rms_norm(n, eps, at, dtype=dtype, out=dtype) for n in (d, c.q_lora_rank, c.head_dim))
    yield rms_norm(c.head_dim, eps, at, weighted=False, dtype=dtype, out=dtype)
    yield rope_angles(c.qk_rope_head_dim, at)
    for heads, width in ((c.num_attention_heads, c.head_dim), (1, c.head_dim), (c.index_n_heads, c.index_head_dim)):
        yield trailing_rope(heads, width, c.qk_rope_head_dim, 1.0, at, **half)
    yield trailing_rope(c.num_attention_heads, c.head_dim, c.qk_rope_head_dim, -1.0, at, **half)
    yield from (swiglu(c.moe_intermediate_size, c.swiglu_limit, at, **half), add(d, at, **half))
    yield from mhc_pre(m, d, c.hc_sinkhorn_iters, c.hc_eps, eps, at, rows=rows, out=dtype)
    yield from (*mhc_head(m, d, c.hc_eps, eps, at, rows=rows, out=dtype), mhc_post(m, d, at, **half))
    for width, columns, ratio in ((2 * c.head_dim, c.head_dim, c.csa_ratio), (c.head_dim, c.head_dim, c.hca_ratio),
                                  (2 * c.index_head_dim, c.index_head_dim, c.csa_ratio)):  # fmt: skip
        yield from kv_compress(width, columns, c.qk_rope_head_dim, ratio, eps, at, **half)
    yield index_scores(c.index_n_heads, c.index_head_dim, c.csa_ratio, at, splits=8 if rows else 1, **half)
    yield from index_top_k(c.index_topk, c.csa_ratio, at)
    experts = c.n_routed_experts, c.num_experts_per_tok
    yield topk_route(*experts, c.routed_scaling_factor, at)
    yield hash_route(*experts, c.routed_scaling_factor, at)
    width = c.moe_intermediate_size
    sizes = ExpertSizes(c.n_routed_experts, d, width, c.num_experts_per_tok, c.swiglu_limit, dtype, rows)
    yield from grouped_experts(sizes, at)
    if c.engram:
        e = c.engram
        yield from engram_hash(e.max_ngram, e.num_addresses, e.pad_id, at)
        yield engram_lookup(e.embed_dim, e.num_addresses, at, **half)
        yield from engram_gate_conv(m, d, e.kernel_size, e.dilation, eps, at, **half)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["v4-flash-engram", "v4-pro-engram"])
@pytest.mark.parametrize("rows", [STEP, None], ids=["step", "prompt"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_published_sizes(device, name, rows, dtype):
    config, at = preset(name), limits(device)
    accept(list(programs(config, at, rows, dtype)), device)
    for sizes in attentions(config, dtype):
        accept(attention_op(sizes, at, splits=8 if rows else 1), device)


@pytest.mark.slow
def test_fp8_products_of_published_sizes():
    at = limits("Ascend950PR_9599")
    for n, k, groups, rows in (*products(preset("v4-flash"), STEP), *products(preset("v4-pro"), None)):
        if groups == 1:
            accept([linear_fp8(n, k, at, rows=rows), quantise_rows(k, at)], at.name)


@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_of_v4_flash(device):
    """Of each family the program that comes closest to a capacity."""
    config, at = preset("v4-flash"), limits(device)
    accept([linear(32768, 1024, at), linear(4096, 4096, at, rows=STEP), rms_norm(4096, 1e-6, at)], device)
    accept([attention_op(attentions(config, "float16")[1], at)[2], index_top_k(512, 4, at)[2]], device)
    accept(mhc_pre(4, 4096, 20, 1e-6, 1e-6, at, rows=STEP), device)
